"Several processes that share a batch find the loss and the averaged gradients of one process that has it all"
import pytest, torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from densessl.ground.ranks import mean_over_ranks
from densessl.theory.modes import flsl_objective, mode_loss
from densessl.theory.prototypes import prototype_objective
from processes import in_ranks

N, D, K = 12, 5, 16  # queries in all, features, prototypes

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo')

def data():
    g = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    return new(N,D), new(N,D), new(N,D), new(K).softmax(-1)

def model():
    torch.manual_seed(1)
    return nn.ModuleDict(dict(body=nn.Linear(D,D), head=nn.Linear(D,K,bias=False))).double()

class Step(nn.Module):
    "Forward with the loss inside, so that DDP sees every parameter; the second level of logits, or of embeddings and prototypes"
    def __init__(self, logits): super().__init__(); self.net, self.logits = model(), logits
    def forward(self, x, mode, positive, prior):
        z, mu = self.net.body(x), self.net.head.weight
        if self.logits:
            total, parts = flsl_objective(z, z+mode, self.net.head(z+mode), self.net.head(positive), prior=prior)
            return total, parts.volume
        second, parts = prototype_objective(z+mode, mu, positive, mu, prior=prior)
        return .03*mode_loss(z, z+mode) + second, parts.kl

CASES = [(logits, uniform) for logits in (True, False) for uniform in (True, False)]

def rank(i, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=init, rank=i, world_size=world)
    *batch, prior = data()
    mine = [x.chunk(world)[i] for x in batch]
    runs = {}
    for logits, uniform in CASES:
        pi = None if uniform else prior
        # gradients averaged by hand, and by DistributedDataParallel
        plain = Step(logits)
        total, volume = plain(*mine, pi)
        total.backward()
        for p in plain.parameters(): dist.all_reduce(p.grad); p.grad /= world
        ddp = nn.parallel.DistributedDataParallel(Step(logits))
        ddp(*mine, pi)[0].backward()
        value = total.detach().clone(); dist.all_reduce(value); value /= world
        runs[logits, uniform] = dict(value=value, volume=volume.detach(), grads=[p.grad for p in plain.parameters()], ddp=[p.grad for p in ddp.parameters()])
    x = torch.full((2,), float(i), requires_grad=True)
    y = mean_over_ranks(x)
    (3*y.sum()).backward()
    runs['mean'] = (y.detach(), x.grad, x.detach())
    torch.save(runs, f'{out}/{i}.pt')
    dist.barrier(); dist.destroy_process_group()

@pytest.mark.parametrize('world', [2, 3])
def test_ranks_equal_one_process(world, tmp_path):
    in_ranks(rank, world, tmp_path)
    *batch, prior = data()
    for i in range(world):
        got = torch.load(tmp_path/f'{i}.pt')
        for logits, uniform in CASES:
            one = Step(True)
            total, volume = one(*batch, None if uniform else prior)
            total.backward()
            run = got[logits, uniform]
            assert_close(run['value'], total.detach()); assert_close(run['volume'], volume)
            for p,g,d in zip(one.parameters(), run['grads'], run['ddp']): assert_close(g, p.grad); assert_close(d, p.grad)
        mean, grad, x = got['mean']
        assert_close(mean, torch.full((2,), (world-1)/2)); assert_close(grad, torch.full((2,), 3.)); assert_close(x, torch.full((2,), float(i)))

def test_one_process_is_left_alone():
    x = torch.ones(3)
    assert mean_over_ranks(x) is x
