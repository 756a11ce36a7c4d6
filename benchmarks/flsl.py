"""What an FLSL training step costs: seconds, memory and shares, against the same step written plainly.

    python benchmarks/flsl.py step [--bf16]      one step of ViT-S/16, 1 teacher 224 + 1 student 224 + 2 local 96 views, batch 8
    python benchmarks/flsl.py loss               head and loss alone, 2,176 and 4,288 queries, K 4,096 and 8,192
    python benchmarks/flsl.py views FOLDER       images a second from JPEG files to the tensors of a step, one process
Runs are interleaved, medians and ratios are printed, peak memory comes from a process of its own for each variant.
"""
import argparse, statistics, time

import torch, torch.nn.functional as F

from common import machine, median_times, peak, rss
from densessl.theory.pooling import query_mask
from densessl.data.augment import make_views
from densessl.methods.encoders import dense_encoder
from densessl.methods.flsl import FLSL, FLSLConfig, FLSLLoss, flsl_recipe
from densessl.methods.heads import PrototypeHead
from densessl.theory.prototypes import prototype_objective
from densessl.training.optim import clip_per_parameter_, split_decay

CONFIG = FLSLConfig(n_prototypes=4096)

def optimizer(model):
    bare, decayed = split_decay(model.student)
    return torch.optim.AdamW([dict(params=bare, weight_decay=0.), dict(params=decayed, weight_decay=.04)], lr=1e-4)

def our_step(bf16, views):
    torch.manual_seed(0)
    model, loss_func = FLSL(dense_encoder('vit_small_patch16_224', drop_path_rate=.1), CONFIG).train(), FLSLLoss(CONFIG)
    for m in model.modules():
        if bf16 and getattr(m, 'fused_attn', False): m.fused_attn = False   # as the learner's AutocastBF16 does on a CPU
    opt = optimizer(model)
    def step():
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16): loss = loss_func(model(views))
        loss.backward()
        clip_per_parameter_(model.student.parameters(), 3.)
        opt.step(); model.update_teacher(.996)
        opt.zero_grad()                           # here, as fastai does: no gradient waits through the next forward pass
    return step, model, opt

def plain_head(h, x): return F.linear(F.normalize(h.mlp(x), dim=-1), F.normalize(h.prototypes, dim=-1))

def plain_step(bf16, views):
    "The same step without care: attention maps and all, teacher traced and repeated for each view, parameter by parameter"
    torch.manual_seed(0)
    model = FLSL(dense_encoder('vit_small_patch16_224', drop_path_rate=.1), CONFIG).train()
    for p in model.teacher.parameters(): p.requires_grad_(True)
    opt = optimizer(model)
    def attend(q, Z, beta): return (beta*q@Z.mT).softmax(-1)@Z
    def step():
        opt.zero_grad()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
            zs, ms, ps, ts = [], [], [], []
            Zt = F.normalize(model.teacher.encoder(views['teacher'].images[0]), dim=-1)
            for name in ('student', 'local'):
                x = views[name].images
                Z = F.normalize(model.student.encoder(x.flatten(0, 1)), dim=-1)
                h = x.shape[-1]//16
                q = Z[query_mask(h, h, 2, n=len(Z))].view(len(Z), -1, Z.shape[-1])
                zs.append(q.flatten(0, 1)); ms.append(attend(q, Z, 2.).flatten(0, 1))
                ts.append(plain_head(model.teacher.head, attend(q, Zt.repeat(x.shape[0], 1, 1), 4.).flatten(0, 1)*384**.5))
                ps.append(plain_head(model.student.head, ms[-1]*384**.5))
            z, m, s, t = map(torch.cat, (zs, ms, ps, ts))
            z, m, s, t = z.float(), m.float(), s.float(), t.float()
            p, q = (s/.1).softmax(-1), (t.detach()/.04).softmax(-1)
            mean = p.mean(0)
            loss = .03*(2-2*F.cosine_similarity(z, m, dim=-1)).mean() - (q*p.log()).sum(-1).mean() + 5*(mean*mean.log()).sum()
        loss.backward()
        for p in model.student.parameters():
            if p.grad is not None: p.grad.mul_(min(1., 3./(p.grad.norm().item()+1e-6)))
        opt.step()
        with torch.no_grad():
            for t,s in zip(model.teacher.parameters(), model.student.parameters()): t.data.mul_(.996).add_(s.data, alpha=.004)
    return step, model, opt

STEPS = dict(ours=our_step, plain=plain_step)

def the_views(bs=8):
    torch.manual_seed(0)
    photos = torch.randint(0, 256, (bs, 3, 256, 256), dtype=torch.uint8)
    return photos, make_views(flsl_recipe(CONFIG), photos)

def shares(bf16, repeats):
    "Seconds of each part of our step, forward and backward where it has one"
    photos, views = the_views()
    _, model, opt = our_step(bf16, views)
    D, x = 384, {k: v.images.flatten(0, 1) for k,v in views.items()}
    cast = lambda: torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16)
    n = len(photos)*67
    m, t = torch.randn(n, D, requires_grad=True), torch.randn(n, D)
    u, u_pos = (F.normalize(torch.randn(n, 256), dim=-1) for _ in range(2))
    u.requires_grad_()
    def student():
        with cast(): out = [model.student.encoder(x[k]) for k in ('student', 'local')]
        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    def teacher():
        with torch.no_grad(), cast(): model.teacher.encoder(x['teacher'])
    def head():
        with cast():
            o = model.student.head.embed(m)
            with torch.no_grad(): model.teacher.head.embed(t)
        o.backward(torch.ones_like(o))
    def loss(): prototype_objective(u, model.student.head.scaled_prototypes(), u_pos, model.teacher.head.scaled_prototypes())[0].backward()
    def optimizer(): clip_per_parameter_(model.student.parameters(), 3.); opt.step()
    student(); head(); loss()
    return median_times(dict(views=lambda: make_views(flsl_recipe(CONFIG), photos), student=student, teacher=teacher, head=head, loss=loss,
                             optimizer=optimizer, ema=lambda: model.update_teacher(.996)), repeats)

def head_and_loss(n, K, plain):
    "Head and loss, forward and backward, as one call"
    torch.manual_seed(0)
    student, teacher = PrototypeHead(384, K), PrototypeHead(384, K).requires_grad_(False)
    x, y = torch.randn(n, 384, requires_grad=True), torch.randn(n, 384)
    if plain: teacher.requires_grad_(True)
    def ours():
        with torch.no_grad(): u_pos, mu_pos = teacher.embed(y), teacher.scaled_prototypes()
        return prototype_objective(student.embed(x), student.scaled_prototypes(), u_pos, mu_pos)[0]
    def plainly():
        p, q = (plain_head(student, x)/.1).softmax(-1), (plain_head(teacher, y).detach()/.04).softmax(-1)
        mean = p.mean(0)
        return -(q*p.log()).sum(-1).mean() + 5*(mean*mean.log()).sum()
    def step():
        (plainly() if plain else ours()).backward()
        student.zero_grad(); teacher.zero_grad(); x.grad = None   # at the end, as fastai does
    return step

def main():
    P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    P.add_argument('what', choices=['step', 'loss', 'views', 'peak']); P.add_argument('args', nargs='*')
    P.add_argument('--bf16', action='store_true'); P.add_argument('--repeats', type=int, default=11); P.add_argument('--threads', type=int, default=2)
    P.add_argument('--cpu', action='store_true', help='loss: seconds of the processor, not of the wall')
    a = P.parse_args()
    torch.set_num_threads(a.threads)
    if a.what=='peak':
        if a.args[0]=='step':
            step, *_ = STEPS[a.args[1]](a.args[2]=='True', the_views()[1]); base = 0.
        else: step, base = head_and_loss(int(a.args[1]), int(a.args[2]), a.args[3]=='plain'), rss()
        for _ in range(3): step()
        return print(rss()-base)
    print(machine(a.threads))
    if a.what=='step':
        views = the_views()[1]
        variants = {f'{k} {"bf16" if b else "fp32"}': f(b, views)[0] for k,f in STEPS.items() for b in ([False, True] if a.bf16 else [False])}
        med = median_times(variants, a.repeats)
        for k,v in med.items(): print(f'{k}: {v:.3f} s, ratio to plain fp32 {v/med["plain fp32"]:.2f}, peak {peak(["step", k.split()[0], k.endswith("bf16")]):.0f} MiB')
        for b in ([False, True] if a.bf16 else [False]):
            part = shares(b, a.repeats)
            print('bf16' if b else 'fp32', ', '.join(f'{k} {v*1e3:.0f} ms ({v/sum(part.values()):.0%})' for k,v in part.items()))
    elif a.what=='loss':
        for n,K in ((2176, 4096), (2176, 8192), (4288, 4096), (4288, 8192)):
            med = median_times({k: head_and_loss(n, K, k=='plain') for k in ('ours', 'plain')}, a.repeats, time.process_time if a.cpu else time.perf_counter)
            mem = {k: peak(['loss', n, K, k]) for k in med}
            print(f'{n} queries, K {K}: ours {med["ours"]:.3f} s, plain {med["plain"]:.3f} s, {med["plain"]/med["ours"]:.2f}x; extra memory {mem["ours"]:.0f} against {mem["plain"]:.0f} MiB, {mem["ours"]/mem["plain"]:.2f}x')
    else:
        from densessl.data.images import image_dls
        torch.set_num_threads(1)
        dls = image_dls(a.args[0], flsl_recipe(CONFIG), bs=32, num_workers=0)
        rates, it = [], iter(dls.train)
        next(it); began = time.perf_counter()
        for i,_ in enumerate(it):
            rates.append(32/(time.perf_counter()-began)); began = time.perf_counter()
            if i+1>=a.repeats: break
        print(f'{statistics.median(rates):.0f} images a second, {1e3/statistics.median(rates):.1f} ms an image')

if __name__=='__main__': main()
