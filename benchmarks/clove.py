"""What a CLoVE training step costs: seconds, memory and shares, against the same step written plainly.

    python benchmarks/clove.py step [--bf16]     one step of ResNet-50, 2 global 224 + 6 local 96 views, batch 4, and the shares of its parts
    python benchmarks/clove.py loss              the loss alone at batch 32: seconds and operator calls, forward and backward
    python benchmarks/clove.py views FOLDER      images a second from JPEG files to the tensors of a step, in the process itself and with one worker
Runs are interleaved, medians and ratios are printed, peak memory comes from a process of its own for each variant
(`python benchmarks/clove.py peak step ours False` prints that of one variant: ours or plain, True for bf16).
"""
import argparse, statistics, time

import torch, torch.nn.functional as F

from common import machine, median_times, peak, rss
from densessl.data.augment import make_views
from densessl.methods.clove import CLoVE, CLoVEConfig, CLoVELoss, MatchedViews, clove_recipe
from densessl.methods.encoders import dense_encoder
from densessl.theory.matching import match_cells
from densessl.training.optim import Lars, split_decay

CONFIG = CLoVEConfig()

def the_photos(bs=4):
    torch.manual_seed(0)
    return torch.randint(0, 256, (bs, 3, 256, 256), dtype=torch.uint8)

def the_views(bs=4): return make_views(clove_recipe(CONFIG), the_photos(bs))

def the_model(config=CONFIG):
    torch.manual_seed(0)
    model = CLoVE(dense_encoder('resnet50'), config).train()
    bare, decayed = split_decay(model.student)
    return model, Lars([dict(params=bare), dict(params=decayed, weight_decay=config.wd)], lr=.1)

def our_step(bf16, views):
    (model, opt), loss_func = the_model(), CLoVELoss(CONFIG)
    def step():
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16): loss = loss_func(model(views))
        loss.backward()
        opt.step(); model.update_teacher(.99)
        opt.zero_grad()                           # here, as fastai does: no gradient waits through the next forward pass
    return step, model, opt

def one_pair(C, F_t, M, c):
    "The loss of one pair of views of one size, written as its formula"
    S = C@F_t.mT
    top = S.masked_fill(M, -float('inf')).topk(c.k, -1).indices[...,1:]
    neg = torch.stack([F_t[b][top[b]].mean(1) for b in range(len(F_t))])
    neg = (C*F.normalize(neg, dim=-1)).sum(-1)
    hinge = (c.margin + neg[...,None] - c.lam*S).relu()*M
    return (hinge.sum((1,2))/M.sum((1,2)).clamp_min(1)).sum(), M.any(2).any(1).sum()

def plain_loss(groups, c=CONFIG):
    "The sum over all pairs of views, one after the other"
    total, n = 0., 0
    for C, T, M in groups:
        C, T = (x.float().expand(*M.shape[:-2], *x.shape[-2:]).flatten(0, -4) for x in (C, T))
        for pair in zip(C, T, M.flatten(0, -4)):
            s, k = one_pair(*pair, c)
            total, n = total+s, n+k
    return total/n

def plain_step(bf16, views):
    "The same step without care: channels first, the pairs of views in a loop, the teacher traced, parameter by parameter"
    c, (model, opt) = CONFIG, the_model()
    model.to(memory_format=torch.contiguous_format)
    for p in model.teacher.parameters(): p.requires_grad_(True)
    def embed(net, x): return net.projector(net.encoder.net.forward_features(x)).flatten(2).transpose(1, 2)
    bufs = {p: torch.zeros_like(p) for p in model.student.parameters()}
    boxes = [b for k in ('global1','global2','local') for b in views[k].boxes]
    images = [x for k in ('global1','global2','local') for x in views[k].images]
    def step():
        opt.zero_grad()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
            Ft = F.normalize(embed(model.teacher, torch.cat(images[:2])), dim=-1).detach().chunk(2)
            Cs = [*model.student.context(embed(model.student, torch.cat(images[:2]))).chunk(2),
                  *model.student.context(embed(model.student, torch.cat(images[2:]))).chunk(len(images)-2)]
            groups = []
            for j in range(2):
                for i in range(len(images)):
                    if i==j: continue
                    grid = [model.student.encoder.grid(*images[o].shape[-2:]) for o in (i, j)]
                    groups.append((Cs[i][None], Ft[j][None], match_cells(boxes[i], grid[0], boxes[j], grid[1], c.threshold)[None]))
        plain_loss(groups).backward()
        with torch.no_grad():
            for p in model.student.parameters():
                g = p.grad
                if p.ndim>1:
                    g = g+c.wd*p
                    g = g*(.001*p.norm()/(g.norm()+1e-8)).item()
                bufs[p] = .9*bufs[p]+g
                p.sub_(.1*bufs[p])
            for k in model.teacher:
                for t,s in zip(model.teacher[k].parameters(), model.student[k].parameters()): t.data = t.data*.99+s.data*.01
    return step, model, opt

STEPS = dict(ours=our_step, plain=plain_step)

def shares(bf16, repeats):
    "Seconds of each part of our step, forward and backward where it has one"
    photos, views = the_photos(), the_views()
    _, model, opt = our_step(bf16, views)
    loss_func, x = CLoVELoss(CONFIG), [torch.cat([views[k].images for k in ks]).flatten(0, 1) for ks in (('global1','global2'), ('local',))]
    cast = lambda: torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16)
    with cast():
        maps = [model.student.encoder.feature_map(i).detach().requires_grad_() for i in x]
        pairs = [MatchedViews(p.context.detach().requires_grad_(), *p[1:]) for p in model(views)]
    def student():
        with cast(): out = [model.student.encoder.feature_map(i) for i in x]
        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    def teacher():
        with torch.no_grad(), cast(): model.teacher.encoder.feature_map(x[0])
    def heads():
        "Projector and attention of the student, projector of the teacher"
        with cast():
            out = [model.student.context(model.student.projector(m).flatten(2).mT) for m in maps]
            with torch.no_grad(): model.teacher.projector(maps[0])
        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    def loss():
        with cast(): l = loss_func(pairs)
        l.backward()
    student(); heads()
    return median_times(dict(views=lambda: make_views(clove_recipe(CONFIG), photos), student=student, teacher=teacher, heads=heads, loss=loss,
                             optimizer=opt.step, ema=lambda: model.update_teacher(.99)), repeats)

def loss_boxes(bs): return make_views(clove_recipe(CLoVEConfig(img_size=32, local_size=16)), the_photos(bs))

def loss_alone(bs, how):
    "Matching and loss, forward and backward, as one call: ours with either reduction, or plain"
    v = loss_boxes(bs)
    def rand(V, N): return F.normalize(torch.randn(V, bs, N, 256), dim=-1)
    Cg, Cl, T = rand(2, 49).requires_grad_(), rand(6, 9).requires_grad_(), rand(2, 49)
    s, t = torch.tensor([[1, 0], [0, 1]])        # student and teacher view of each pair
    bg, bl = torch.cat([v['global1'].boxes, v['global2'].boxes]), v['local'].boxes
    loss_func = CLoVELoss(CLoVEConfig(reduction='pair' if how=='plain' else how))
    def f():
        Cg.grad = Cl.grad = None
        groups = [MatchedViews(Cg[s], T[t], match_cells(bg[s], (7,7), bg[t], (7,7))), MatchedViews(Cl[None], T[:,None], match_cells(bl[None], (3,3), bg[:,None], (7,7)))]
        (plain_loss if how=='plain' else loss_func)(groups).backward()
    return f

def count_calls(f):
    "Operator calls of `f`, those made by other operators not counted"
    f()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: f()
    def name(e): return e.name if e.name.startswith('aten::') else ''
    ops = [e for e in prof.events() if name(e)]
    outer = [e for e in ops if not (e.cpu_parent and name(e.cpu_parent))]
    return len(outer), len(ops)

def time_folder(folder, workers, repeats, bs=16):
    "Images a second of the loader: median over the batches after the first one"
    from densessl.data.images import image_dls
    torch.set_num_threads(1)
    dls, times = image_dls(folder, clove_recipe(CONFIG), bs=bs, num_workers=workers), []
    while len(times)<repeats:
        it = iter(dls.train)
        next(it); began = time.perf_counter()
        for _ in it:
            times.append(time.perf_counter()-began); began = time.perf_counter()
            if len(times)>=repeats: break
    return bs/statistics.median(times)

def main():
    P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    P.add_argument('what', choices=['step', 'loss', 'views', 'peak']); P.add_argument('args', nargs='*')
    P.add_argument('--bf16', action='store_true'); P.add_argument('--repeats', type=int, default=11); P.add_argument('--threads', type=int, default=2)
    a = P.parse_args()
    torch.set_num_threads(a.threads)
    if a.what=='peak':
        if a.args[0]=='step': f, *_ = STEPS[a.args[1]](a.args[2]=='True', the_views()); base = 0.
        elif a.args[0]=='views': f, base = lambda: time_folder(a.args[1], 0, 3), rss()
        else: f, base = loss_alone(32, a.args[1]), rss()
        for _ in range(3): f()
        return print(rss()-base)
    print(machine(a.threads))
    bf16 = [False, True] if a.bf16 else [False]
    if a.what=='step':
        views = the_views()
        med = median_times({f'{k} {"bf16" if b else "fp32"}': f(b, views)[0] for k,f in STEPS.items() for b in bf16}, a.repeats)
        for k,v in med.items(): print(f'{k}: {v:.3f} s, ratio to plain fp32 {v/med["plain fp32"]:.2f}, peak {peak(["step", k.split()[0], k.endswith("bf16")]):.0f} MiB')
        for b in bf16:
            part = shares(b, a.repeats)
            print('bf16' if b else 'fp32', ', '.join(f'{k} {v*1e3:.0f} ms ({v/sum(part.values()):.0%})' for k,v in part.items()))
    elif a.what=='loss':
        variants = {k: loss_alone(32, k) for k in ('pair', 'mean', 'plain')}
        med = median_times(variants, a.repeats)
        for k,v in med.items():
            outer, every = count_calls(variants[k])
            print(f'{k}: {v*1e3:.1f} ms, {med["plain"]/v:.2f}x plain, {outer} operator calls ({every} with those inside them), extra memory {peak(["loss", k]):.0f} MiB')
    else:
        for workers in (0, 1):
            rate = time_folder(a.args[0], workers, a.repeats)
            print(f'{workers} workers: {rate:.0f} images a second, {1e3/rate:.1f} ms an image')
        print(f'extra memory {peak(["views", a.args[0]]):.0f} MiB')

if __name__=='__main__': main()
