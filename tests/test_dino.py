"DINO's loss against forms written otherwise, its center in several processes, and the module under fastai"
import pytest, torch
import torch.distributed as dist
import torch.nn.functional as F
from dataclasses import replace
from timm.loss import SoftTargetCrossEntropy
from torch.testing import assert_close

from densessl.data.augment import make_views
from densessl.methods.dino import (DINO, DINOLoss, DINOOutput, diagnose_dino, dino_loss, dino_presets, dino_recipe,
                                   dino_state, view_information)
from densessl.methods.encoders import dense_encoder
from densessl.theory.codes import center_update
from densessl.ground.synthetic import draw_scenes
from processes import in_ranks

tiny = replace(dino_presets['scenes'], img_size=32, local_size=16, n_local=2, hidden_dim=32, bottleneck_dim=16, n_prototypes=32)

def new(*s, seed=0): return torch.randn(*s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def model():
    torch.manual_seed(0)
    return DINO(dense_encoder('vit_tiny_patch16_224', patch_size=8, img_size=32, embed_dim=24, depth=1, num_heads=3), tiny)

@pytest.mark.parametrize('V,G', [(2,1), (2,2), (5,2), (4,3)])
def test_loss_and_gradient_equal_loops(V, G):
    s, t, c = new(V,4,7), new(G,4,7,seed=1), new(7,seed=2)
    grads = []
    for form in ('ours', 'timm', 'torch'):
        x, terms = s.clone().requires_grad_(), []
        if form=='ours': loss = dino_loss(x, t, c, .3, .2).loss
        else:
            for v in range(V):
                for g in range(G):
                    if g==v: continue
                    target = torch.exp((t[g]-c)/.2); target = target/target.sum(1, keepdim=True)
                    terms.append(SoftTargetCrossEntropy()(x[v]/.3, target) if form=='timm' else F.cross_entropy(x[v]/.3, target))
            loss = sum(terms)/len(terms)
        grads.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for other in grads[1:]: assert_close(grads[0], other)

def test_information_is_of_the_photograph_not_of_the_view():
    "A student that learned which view it sees, and nothing of the photograph: the loss is 0, and the run is warned"
    B, K = 6, 32
    teacher = 20*torch.eye(K)[:2,None].expand(2, B, K)      # the target of view 0 is prototype 0, that of view 1 prototype 1
    student = teacher.flip(0).clone()                       # each view predicts the other's
    class Learn:
        loss_func, pred = DINOLoss(tiny), DINOOutput(student, teacher, torch.zeros(K), torch.randn(B, 16, 8, generator=torch.Generator().manual_seed(0)))
    loss = Learn.loss_func(Learn.pred)
    state = {k: float(v) for k,v in dino_state(Learn).items()}
    assert loss<1e-6 and state['perplexity']>1.99           # to the loss and to the prototypes in use all is well
    assert abs(state['information'])<1e-4
    said, = diagnose_dino(state | dict(epoch=0))
    assert 'tell the views apart, not the photographs' in said

@pytest.mark.parametrize('G', [1, 2, 3])
def test_information_has_its_bound(G, V=3, K=7):
    "The mean over photographs of what their target has beyond the mean target of its view, less the student's distance"
    for B in (1, 4):
        s, t, c = new(V,B,K), new(G,B,K,seed=1), new(K,seed=2)
        terms = dino_loss(s, t, c, .3, .2)
        q = ((t-c)/.2).softmax(-1)
        shared = sum(F.kl_div(q[g].mean(0).log().expand(B, K), q[g], reduction='batchmean') for g in range(G))/G
        assert_close(view_information(terms), shared-terms.kl)
        assert view_information(terms)<=torch.tensor(float(B)).log()+1e-12

def test_center_follows_and_is_restored():
    m, views = model().train(), make_views(dino_recipe(tiny), draw_scenes(3, 48, seed=0)[0])
    for _ in range(3): m(views)
    assert_close(m.center, (1-.9**3)*m.eval()(views).teacher_logits.mean((0,1)), rtol=1e-4, atol=1e-6)
    other = model()
    other.load_state_dict(m.state_dict())
    assert_close(other.center, m.center)

def test_half_precision():
    m, views = model().train(), make_views(dino_recipe(tiny), draw_scenes(3, 48, seed=0)[0])
    f = DINOLoss(tiny)
    with torch.autocast('cpu', dtype=torch.bfloat16): loss = f(m(views))
    loss.backward()
    assert loss.dtype==m.center.dtype==torch.float32
    assert all(torch.isfinite(p.grad).all() for p in m.student.parameters() if p.grad is not None)

def rank(i, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=init, rank=i, world_size=world)
    s, t, c = new(4,6,9), new(2,6,9,seed=1), new(9,seed=2)
    x = s.chunk(world, 1)[i].clone().requires_grad_()
    terms = dino_loss(x, t.chunk(world, 1)[i], c)
    terms.loss.backward()
    torch.save((terms.loss.detach(), x.grad/world, center_update(c, t.chunk(world, 1)[i])), f'{out}/{i}.pt')
    dist.barrier(); dist.destroy_process_group()

@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo')
def test_processes_equal_one(tmp_path, world=2):
    in_ranks(rank, world, tmp_path)
    s, t, c = new(4,6,9).requires_grad_(), new(2,6,9,seed=1), new(9,seed=2)
    loss = dino_loss(s, t, c).loss
    loss.backward()
    got = [torch.load(tmp_path/f'{i}.pt') for i in range(world)]
    assert_close(sum(g[0] for g in got)/world, loss.detach())
    assert_close(torch.cat([g[1] for g in got], 1), s.grad)
    for g in got: assert_close(g[2], center_update(c, t))
