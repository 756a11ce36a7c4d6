"""What fine-tuning a detector costs: seconds, memory and shares of a step, and images a second, against torchvision's Mask R-CNN.

    python benchmarks/transfer.py [ROW...] [--json FILE]     every row, or those that are named
    python benchmarks/transfer.py r50_320 --device cuda      the same on a GPU

A row is a detector on drawn scenes of one size. Mask R-CNN R50-FPN stands beside torchvision's own `maskrcnn_resnet50_fpn_v2`, which has the same layers and
here the same weights, on the same images; its steps and ours take turns, and their ratio is that of the medians. On a CPU seconds are those of the processor.
Peak memory comes from a process of its own for each variant.
"""
import argparse, json, time
from pathlib import Path

import torch

from common import machine, median_times, peak, rss
from densessl.methods.encoders import dense_encoder
from densessl.transfer.detector import Detector, DetectorConfig
from densessl.transfer.formats import foreign_weights
from densessl.transfer.heads import paste_masks
from densessl.transfer.instances import scene_instances

V2 = dict(norm='sync', box_convs=4, proposal_convs=2)      # what torchvision's second version has
TINY = dict(channels=64, hidden=256, n_anchors=64, n_before=(200,200), n_after=(50,50), n_regions=32, mask_convs=2)
ROWS = {   # encoder, size of its positions, side of the images, images a step, settings of the detector
    'r50_320': ('resnet50', 224, 320, 2, V2), 'r50_640': ('resnet50', 224, 640, 1, V2),
    'vit_s16_480': ('vit_small_patch16_224', 224, 480, 1, {}), 'scenes': ('test_resnet', 64, 64, 8, TINY)}

class Row:
    "A detector, its images and their targets; torchvision's beside it where it has one"
    def __init__(self, name, device):
        arch, built, self.side, self.n, settings = ROWS[name]
        torch.manual_seed(0)
        self.device, self.data = device, scene_instances(self.n, self.side)
        self.ours = Detector(dense_encoder(arch, built), len(self.data.classes), DetectorConfig(**settings)).to(device)
        self.images, self.targets = self.batch()
        self.has_theirs = settings is V2
    def batch(self):
        "Images and targets as the loader gives them"
        images, targets = zip(*[self.data[i] for i in range(self.n)])
        tensors = [{k: v.as_subclass(torch.Tensor).to(self.device) for k,v in t.items() if isinstance(v, torch.Tensor)} for t in targets]
        return [i.as_subclass(torch.Tensor).to(self.device) for i in images], tensors
    def theirs(self):
        "torchvision's Mask R-CNN with the same weights, for images of this size"
        from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
        model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=len(self.data.classes)+1,
                                         min_size=self.side, max_size=self.side)
        model.load_state_dict(foreign_weights(self.ours, 'torchvision'))
        return model.to(self.device)
    def sync(self):
        if self.device!='cpu': torch.cuda.synchronize()
    def step(self, model, images, targets):
        "One step of training"
        model.train()
        opt = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=.9)
        def step():
            sum(model(images, targets).values()).backward()
            opt.step(); opt.zero_grad()
            self.sync()
        return step
    def our_step(self): return self.step(self.ours, self.images, self.targets)
    def their_step(self):
        masks = [t | dict(masks=t['masks'].to(torch.uint8)) for t in self.targets]
        return self.step(self.theirs(), [i/255 for i in self.images], masks)

    def shares(self):
        "Functions for the parts of our step, each forward and backward"
        m, images = self.ours.train(), self.ours.image_list(self.images)
        def fresh(maps): return type(maps)((k, v.detach().requires_grad_()) for k,v in maps.items())
        maps = m.pyramid(images.tensors)
        with torch.no_grad(): proposals, _ = m.proposals(images, maps, self.targets)
        maps = fresh(maps)
        opt = torch.optim.SGD(m.parameters(), lr=1e-4, momentum=.9)
        def backbone():
            found = list(m.pyramid(images.tensors).values())
            torch.autograd.backward(found, [torch.ones_like(f) for f in found])
        def backward(losses): sum(losses.values()).backward()
        parts = dict(data=lambda: m.image_list(self.batch()[0]), backbone=backbone,
                     proposals=lambda: backward(m.proposals(images, fresh(maps), self.targets)[1]),
                     heads=lambda: backward(m.heads(fresh(maps), proposals, images.image_sizes, self.targets)[1]), optimizer=opt.step)
        return {k: lambda f=f: (f(), self.sync()) for k,f in parts.items()}

    def our_answer(self):
        "Detections with masks pasted into the image"
        model = self.ours.eval()
        @torch.no_grad()
        def answer():
            for found in model(self.images): paste_masks(found['masks'], found['boxes'], (self.side,)*2)
            self.sync()
        return answer
    def their_answer(self):
        model, images = self.theirs().eval(), [i/255 for i in self.images]
        @torch.no_grad()
        def answer(): model(images), self.sync()
        return answer

def measure(name, device, repeats, memory=True):
    "All numbers of a row"
    row, clock = Row(name, device), time.process_time if device=='cpu' else time.perf_counter
    variants = dict(ours=row.our_step()) | (dict(torchvision=row.their_step()) if row.has_theirs else {})
    steps = median_times(variants, repeats, clock)
    answers = dict(ours=row.our_answer()) | (dict(torchvision=row.their_answer()) if row.has_theirs else {})
    seconds = median_times(answers, repeats, clock)
    parts = median_times(row.shares(), repeats, clock)
    out = dict(side=row.side, images=row.n, step=steps, images_a_second={k: row.n/v for k,v in seconds.items()},
               share={k: v/sum(parts.values()) for k,v in parts.items()}, parts=parts)
    if row.has_theirs: out['ratio'] = steps['ours']/steps['torchvision']
    if memory: out['peak_mib'] = {k: peak([name, k, device]) for k in variants}
    return out

def main():
    P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    P.add_argument('rows', nargs='*', default=list(ROWS)); P.add_argument('--repeats', type=int, default=5)
    P.add_argument('--device', default='cpu'); P.add_argument('--json', type=Path); P.add_argument('--threads', type=int, default=1)
    P.add_argument('--no-memory', action='store_true', help='leave out the processes that measure peak memory')
    a = P.parse_args()
    torch.set_num_threads(a.threads)
    if a.rows[0]=='peak':
        _, name, which, device = a.rows
        row = Row(name, device)
        step = row.our_step() if which=='ours' else row.their_step()
        row.ours = None       # the step holds the model that it needs
        for _ in range(2): step()
        return print(rss() if device=='cpu' else torch.cuda.max_memory_allocated()/2**20)
    out = json.loads(a.json.read_text()) if a.json and a.json.exists() else {}
    out['machine'] = machine(a.threads) if a.device=='cpu' else torch.cuda.get_device_name()
    print(out['machine'])
    for name in a.rows:
        out[name] = measure(name, a.device, a.repeats, not a.no_memory)
        print(name, json.dumps(out[name]), flush=True)
        if a.json: a.json.write_text(json.dumps(out, indent=1)+'\n')

if __name__=='__main__': main()
