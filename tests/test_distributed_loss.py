"Several processes that share a batch find the loss and the averaged gradients of one process that has it all"
import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from densessl.modes import flsl_objective, mean_over_ranks

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
    "Forward with the loss inside, so that DDP sees every parameter"
    def __init__(self): super().__init__(); self.net = model()
    def forward(self, x, mode, positive, prior):
        z = self.net.body(x)
        return flsl_objective(z, z+mode, self.net.head(z+mode), self.net.head(positive), prior=prior)

def rank(i, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=init, rank=i, world_size=world)
    *batch, prior = data()
    mine = [x.chunk(world)[i] for x in batch]
    runs = {}
    for prior_name, pi in (('uniform', None), ('prior', prior)):
        # gradients averaged by hand, and by DistributedDataParallel
        plain = Step()
        total, parts = plain(*mine, pi)
        total.backward()
        for p in plain.parameters(): dist.all_reduce(p.grad); p.grad /= world
        ddp = nn.parallel.DistributedDataParallel(Step())
        ddp(*mine, pi)[0].backward()
        value = total.detach().clone(); dist.all_reduce(value); value /= world
        runs[prior_name] = dict(value=value, volume=parts.volume, grads=[p.grad for p in plain.parameters()], ddp=[p.grad for p in ddp.parameters()])
    x = torch.full((2,), float(i), requires_grad=True)
    y = mean_over_ranks(x)
    (3*y.sum()).backward()
    runs['mean'] = (y.detach(), x.grad, x.detach())
    torch.save(runs, f'{out}/{i}.pt')
    dist.barrier(); dist.destroy_process_group()

@pytest.mark.parametrize('world', [2, 3])
def test_ranks_equal_one_process(world, tmp_path):
    mp.spawn(rank, args=(world, f'file://{tmp_path}/init', str(tmp_path)), nprocs=world)
    *batch, prior = data()
    for i in range(world):
        got = torch.load(tmp_path/f'{i}.pt')
        for prior_name, pi in (('uniform', None), ('prior', prior)):
            one = Step()
            total, parts = one(*batch, pi)
            total.backward()
            run = got[prior_name]
            assert_close(run['value'], total.detach()); assert_close(run['volume'], parts.volume)
            for p,g,d in zip(one.parameters(), run['grads'], run['ddp']): assert_close(g, p.grad); assert_close(d, p.grad)
        mean, grad, x = got['mean']
        assert_close(mean, torch.full((2,), (world-1)/2)); assert_close(grad, torch.full((2,), 3.)); assert_close(x, torch.full((2,), float(i)))

def test_one_process_is_left_alone():
    x = torch.ones(3)
    assert mean_over_ranks(x) is x
