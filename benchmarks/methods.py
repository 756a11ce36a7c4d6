"""What a step of each method costs beside DINO's on the same network: seconds and peak memory, views, optimizer and teacher included.

    python benchmarks/methods.py [--methods byol,mae] [--repeats 9] [--save FILE]

Settings are those for drawn scenes, in batches of 32. Steps are interleaved with DINO's, medians and ratios printed; memory is what three steps take
beyond the model and the libraries, in a process of its own (`python benchmarks/methods.py peak byol byol` prints that of one).
"""
import argparse, json

import torch

from common import machine, median_times, peak, rss
from densessl.data.augment import make_views
from densessl.ground.synthetic import draw_scenes
from densessl.methods.encoders import dense_encoder
from densessl.training.choices import parse_kwargs
from densessl.training.learner import methods, optimizers
from densessl.training.optim import split_decay

BATCH = 32

def the_step(name, network=None):
    "One step of a method on its own network for scenes, or on that of another"
    m, other = methods[name], methods[network or name]
    config = m.presets['scenes']
    torch.manual_seed(0)
    encoder = dense_encoder(other.scene_arch, img_size=config.img_size, **parse_kwargs(other.scene_kwargs))
    config = m.complete(config, encoder, BATCH)
    model, loss_func = m.model(encoder, config).train(), m.loss(config)
    opt = optimizers[getattr(config, 'optimizer', 'adamw')](split_decay(model.student), lr=1e-3)
    photos, hw = draw_scenes(BATCH, 80, seed=1, natural=True)[0], torch.full((BATCH, 2), 80)
    def step():
        loss = loss_func(model(make_views(m.recipe(config), photos, hw)))
        loss.backward()
        opt.step()
        opt.zero_grad()
        model.update_teacher(.99)
    return step

def one_peak(name, network):
    step, before = the_step(name, network), rss()
    for _ in range(3): step()
    print(rss()-before)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', nargs='*')
    p.add_argument('--methods', default=','.join(methods))
    p.add_argument('--repeats', type=int, default=9)
    p.add_argument('--save')
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.what: one_peak(*args.what[1:])
    else:
        print(machine(1))
        rows = []
        for name in args.methods.split(','):
            times = median_times({'own': the_step(name), 'dino': the_step('dino', name)}, args.repeats)
            memory = {k: peak([k, name]) for k in (name, 'dino')}
            rows.append(dict(method=name, ms=1000*times['own'], time=times['own']/times['dino'], mib=memory[name], memory=memory[name]/memory['dino']))
            print('{method:10} {ms:6.0f} ms, {time:.2f} of DINO; {mib:5.0f} MiB, {memory:.2f} of DINO'.format(**rows[-1]), flush=True)
        if args.save:
            with open(args.save, 'w') as f: json.dump(rows, f, indent=1)
