"""What the dense scores cost: seconds and memory of the nearest-neighbor score, how both grow with the memory, and videos.

    python benchmarks/evaluation.py score FOLDER    labelled folder (any layout of `labelled_data`), ViT-S/16 at 224: seconds of each part, peak memory,
                                                    share of the extraction outside the backbone
    python benchmarks/evaluation.py memory          neighbors of 2,048 patches among 10 k to 1 M: made-up unit vectors of 384 dimensions, 150 classes
    python benchmarks/evaluation.py davis FOLDER    folder in the layout of DAVIS: frames a second of features, propagation and scoring
The network is not trained: that changes no time. `--busy` counts processor seconds instead of seconds on the wall, for a machine that others use; with one thread they
are what an idle machine would take. Peak memory comes from a process of its own for each variant.
"""
import argparse, statistics, time

import torch, torch.nn.functional as F

from common import machine, peak, rss
from densessl.methods.encoders import dense_encoder
from densessl.evaluation.features import MAX_PATCHES, patch_bank
from densessl.evaluation.probes import class_map_ious, neighbor_labels, neighbor_probe
from densessl.data.labelled import labelled_data
from densessl.evaluation.davis import davis_sequences, video_scores
from densessl.evaluation.video import propagate_video

QUERIES, DIM, CLASSES, GRID = 2048, 384, 150, 196
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
clock = time.perf_counter

class Clock:
    "Seconds spent inside `f`"
    def __init__(self, f): self.f, self.seconds, self.calls = f, 0., 0
    def __call__(self, *args):
        began = now(); out = self.f(*args)
        self.seconds, self.calls = self.seconds+now()-began, self.calls+1
        return out

def now():
    if DEVICE=='cuda': torch.cuda.synchronize()
    return clock()

def medians(fs, repeats):
    "Median seconds of each function, in turn, after one warm-up each"
    rounds = [[(b := now(), f(), now()-b)[2] for f in fs] for _ in range(repeats+1)][1:]
    return [statistics.median(t) for t in zip(*rounds)]

def timed_encoder(arch, **kwargs):
    torch.manual_seed(0)
    e = dense_encoder(arch, **kwargs).to(DEVICE)
    e.feature_map = Clock(e.feature_map)
    return e

def vectors(M):
    "Unit vectors and class shares of M made-up patches"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(M, DIM, generator=g)
    x /= x.norm(dim=1, keepdim=True)
    return x.to(DEVICE), F.one_hot(torch.randint(CLASSES, (M,), generator=g), CLASSES).float().to(DEVICE) if M<=10**5 else torch.full((M,CLASSES), 1/CLASSES, device=DEVICE)

def score(folder, arch, size, splits, memory):
    "One nearest-neighbor score, its parts timed"
    began = now()
    train, test = labelled_data(folder, size, splits)
    read = now()
    encoder = timed_encoder(arch)
    bank = patch_bank(encoder, train, memory or MAX_PATCHES, progress=False)
    filled, inside = now(), encoder.feature_map.seconds
    names = Clock(neighbor_probe(memory=memory).fit(bank))
    (value, *_), = class_map_ious(encoder, test, dict(nn=names), progress=False)[0].values()
    done = now()
    extraction, backbone = filled-read, inside
    print(f'{train.name} ({len(train)}) -> {test.name} ({len(test)}), {arch} at {size}, memory {len(bank.order):,} patches')
    print(f'reading {read-began:.1f} s; memory {extraction:.1f} s, {len(train)/extraction:.1f} images a second, of which outside the backbone {1-backbone/extraction:.1%}')
    test_backbone = encoder.feature_map.seconds-inside
    print(f'scoring {done-filled:.1f} s: backbone {test_backbone:.1f} s, neighbors {names.seconds:.1f} s, upsampling and counting {done-filled-test_backbone-names.seconds:.1f} s')
    print(f'total {done-began:.1f} s, mIoU {value:.3f} (an untrained network)')

def davis(folder, arch, names, size):
    encoder, rows = timed_encoder(arch), []
    for s in davis_sequences(folder, names=names):
        v = s.load()
        began, was = now(), encoder.feature_map.seconds
        pred, grid = propagate_video(encoder, v, size, progress=False)
        followed = now(); video_scores(pred, v.masks); scored = now()
        features = encoder.feature_map.seconds-was
        rows.append((len(v), features, followed-began-features, scored-followed))
        print(f'{v.name}: {len(v)} frames, cells {grid[1]}x{grid[2]}, ' + ', '.join(f'{k} {len(v)/t:.1f}' for k,t in zip(('features', 'propagation', 'J and F'), rows[-1][1:])) + ' frames a second')
    n, *t = map(sum, zip(*rows))
    print(f'{n} frames: features {n/t[0]:.1f}, propagation {n/t[1]:.1f}, J and F {n/t[2]:.1f}, all {n/sum(t):.1f} frames a second')

def main():
    P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    P.add_argument('what', choices=['score', 'memory', 'davis', 'peak']); P.add_argument('args', nargs='*')
    P.add_argument('--arch', default='vit_small_patch16_224'); P.add_argument('--size', type=int); P.add_argument('--splits', nargs=2); P.add_argument('--limit', type=int, help='patches in the memory')
    P.add_argument('--sizes', type=int, nargs='+', default=[10_000, 30_000, 100_000, 300_000, 1_000_000]); P.add_argument('--names', nargs='+'); P.add_argument('--repeats', type=int, default=3)
    P.add_argument('--threads', type=int, default=2); P.add_argument('--busy', action='store_true')
    a = P.parse_args()
    global clock
    if a.busy: clock = time.process_time
    torch.set_num_threads(a.threads)
    if a.what=='peak':
        if a.args[0]=='score': score(a.args[1], a.args[2], int(a.args[3]), a.args[4:6] or None, None)
        else:
            base, (x, y) = rss(), vectors(int(a.args[1]))
            neighbor_labels(x[torch.arange(QUERIES)%len(x)], x, y)
            return print(rss()-base)
        return print(rss())
    print(machine(a.threads), DEVICE, 'processor seconds' if a.busy else 'seconds on the wall')
    if a.what=='score':
        size = a.size or 224
        score(a.args[0], a.arch, size, a.splits, a.limit)
        if DEVICE=='cpu': print(f'peak memory of a process that does this alone {peak(["score", a.args[0], a.arch, size, *(a.splits or [])]):.0f} MiB')
        else: print(f'peak GPU memory {torch.cuda.max_memory_allocated()/2**20:.0f} MiB')
    elif a.what=='memory':
        for M in a.sizes:
            x, y = vectors(M)
            q = x[torch.arange(QUERIES)%M]
            if DEVICE=='cuda': torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated()
            def run(): neighbor_labels(q, x, y)
            def product():   # the similarities alone
                for part in q.split(1024):
                    for keys in x.split(2**15): part@keys.T
            t, bare = medians((run, product), a.repeats if M<=10**5 else 1)
            held = M*(DIM+CLASSES)*4/2**20
            extra = (torch.cuda.max_memory_allocated()-base)/2**20 if DEVICE=='cuda' else peak(['memory', M])-held
            print(f'memory {M:>9,}: {t:7.2f} s for {QUERIES} queries, {t/QUERIES*GRID*1e3:8.1f} ms an image of {GRID} patches, {t/bare:.2f} of the bare products; the memory itself {held:.0f} MiB, beside it {extra:.0f} MiB', flush=True)
            del x, y, q
    else: davis(a.args[0], a.arch, a.names, a.size)

if __name__=='__main__': main()
