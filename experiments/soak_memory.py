"""Does memory grow over 2,000 steps, and is anything left behind? Tiny FLSL and CLoVE runs, with and without workers, each in a process of its own.

    python experiments/soak_memory.py OUT [--steps 2000] [--methods flsl clove] [--workers 0 2]

The curves that a learner keeps on purpose are about 1,000 bytes a step, 600 of them fastai's list of losses; what grows beyond them is a leak.
Writes OUT/memory.json (bytes at each look, bytes leaked per 1,000 steps, open files and child processes before and after) and OUT/memory.png."""
import argparse, ctypes, gc, json, os, subprocess, sys, time, warnings
from dataclasses import replace
from pathlib import Path

METHODS = ('flsl', 'clove', 'dino')
STEPS_AN_EPOCH, BATCH, WARM = 125, 4, .25     # the first quarter, in which allocators and caches fill, is not counted

def resident():
    "Bytes of this process that are in memory (RSS), once the allocator has given back what is free"
    gc.collect()
    if sys.platform=='linux': getattr(ctypes.CDLL(None), 'malloc_trim', lambda n: None)(0)     # glibc
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')

def children():
    "Processes that this one has started and that still run"
    return sum(len(p.read_text().split()) for p in Path('/proc/self/task').glob('*/children'))

def handles(): return len(os.listdir('/proc/self/fd'))

def slope(steps, values):
    "Least squares: growth of `values` a step"
    n, ms, mv = len(steps), sum(steps)/len(steps), sum(values)/len(values)
    return sum((s-ms)*(v-mv) for s,v in zip(steps, values))/sum((s-ms)**2 for s in steps)

def learner(method, workers):
    from densessl.data.images import scene_dls
    from densessl.training.learner import learner as learner_of, methods
    m = methods[method]
    config = replace(m.presets['scenes'], img_size=32, local_size=16, n_local=1 if method!='clove' else 0, hidden_dim=32)
    kwargs = dict(output_stride=8, stem_width=8, channels=[8, 8, 8, 16]) if method=='clove' else dict(patch_size=8, embed_dim=24, depth=1, num_heads=2)
    config = replace(config, out_dim=16, num_heads=2, k=4) if method=='clove' else replace(config, bottleneck_dim=16, n_prototypes=16)
    dls = scene_dls(STEPS_AN_EPOCH*BATCH, m.recipe(config), bs=BATCH, num_workers=workers)
    return learner_of(dls, m.scene_arch, m, config, model_kwargs=kwargs)

def one(method, workers, steps, every=25):
    "A run; prints its numbers as JSON"
    warnings.simplefilter('ignore')
    import torch
    from fastai.callback.core import Callback, CancelFitException
    torch.set_num_threads(1)
    class Look(Callback):
        order,run_valid = 2000,False
        def before_fit(self): self.rows, self.total = [], 0
        def after_batch(self):
            self.total += 1
            if self.total%every==0: self.rows.append((self.total, resident()))
            if self.total>=steps: raise CancelFitException
    learn = learner(method, workers)
    learn.add_cb(look := Look())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)          # the first start of workers opens what stays open
        gc.collect()
        before = dict(handles=handles(), children=children())
        began = time.time()
        learn.fit(-(-steps//STEPS_AN_EPOCH))
    seconds = time.time()-began
    learn.dl = None
    gc.collect(); time.sleep(.5)
    rows = [r for r in look.rows if r[0]>WARM*steps]
    print('RESULT'+json.dumps(dict(method=method, workers=workers, steps=look.total, seconds=round(seconds, 1), rss=look.rows, bytes_per_1000_steps=round(1000*slope(*zip(*rows))),
                          largest_growth=max(v for _,v in rows)-rows[0][1], before=before, after=dict(handles=handles(), children=children()))))

def plot(runs, path):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(4, 2.6), dpi=72, constrained_layout=True)
    for r in runs: ax.plot([s for s,_ in r['rss']], [(b-r['rss'][0][1])/1e6 for _,b in r['rss']], label=f"{r['method']}, {r['workers']} workers, from {r['rss'][0][1]/1e6:.0f} MB")
    ax.axline((0, 0), slope=1e-3, c='k', lw=.7, ls=':', label='curves kept on purpose')
    ax.set(xlabel='step', ylabel='MB since the first look', ylim=(0, 10)); ax.legend(fontsize=7)
    fig.savefig(path)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path)
    p.add_argument('--steps', type=int, default=2000)
    p.add_argument('--methods', nargs='+', choices=METHODS, default=['flsl', 'clove'])
    p.add_argument('--workers', nargs='+', type=int, default=[0, 2])
    p.add_argument('--one', action='store_true', help='run the first method and number of workers here')
    a = p.parse_args()
    if a.one: return one(a.methods[0], a.workers[0], a.steps)
    a.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for method in a.methods:
        for workers in a.workers:
            cmd = [sys.executable, __file__, str(a.out), '--one', '--steps', str(a.steps), '--methods', method, '--workers', str(workers)]
            r = subprocess.run(cmd, capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
            if r.returncode: sys.exit(r.stderr)
            runs.append(json.loads(r.stdout.split('RESULT')[1]))
            n = runs[-1]
            print(f"{method}, {workers} workers: {n['steps']} steps in {n['seconds']} s, {n['bytes_per_1000_steps']:,} bytes per 1,000 steps, open files {n['before']['handles']} -> {n['after']['handles']}, child processes {n['before']['children']} -> {n['after']['children']}", flush=True)
            (a.out/'memory.json').write_text(json.dumps(runs, indent=1))
    plot(runs, a.out/'memory.png')

if __name__=='__main__': main()
