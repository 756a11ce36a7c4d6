"Canvases are kept in memory, and nothing else changes: the same batches to the bit, in any run, on any number of processes"
import random
import warnings

import numpy as np
import pytest
import torch
from fastai.data.load import DataLoader
from PIL import Image

from densessl.data import images as data
from densessl.data import canvases, kept
from densessl.data.order import rest_of_epoch
from densessl.ground.core import InputError
from densessl.data.images import MakeViews, ViewLoader, n_workers, image_dls, scene_dls
from densessl.training.distributed import RankLoader
from densessl.ground.synthetic import draw_scenes
from densessl.data.views import CropSpec, Recipe
from pretend_gpu import OnGPU, pretend_gpu

RECIPE = Recipe((CropSpec('teacher', 32, (.8, 1.)), CropSpec('local', 16, (.05, .4), within='teacher', count=2)))
N, BS = 23, 5


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "23 files: two cannot be read, one is a panorama, one is exactly 2 : 1"
    folder = tmp_path_factory.mktemp('photos')
    for i, x in enumerate(draw_scenes(N-4, 48)[0]): Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()).save(folder/f'{i:02}.png')
    noise = np.random.RandomState(0).randint(0, 255, (40, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder/'long.png')
    Image.fromarray(noise[:, :80]).save(folder/'twice.png')
    for o in ('bad.jpg', 'worse.jpg'): (folder/o).write_bytes(b'oops')
    return folder


def loaders(photos, cache, workers=0, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return image_dls(photos, RECIPE, bs=BS, num_workers=workers, seed=3, cache=cache, **dict(device='cpu')|kwargs)


def batch(b): return [t.clone() for v in b[0].values() for t in (v.images, v.boxes)]+[b[1]]


def epochs(dls, n=4, dl=None):
    "All that n epochs give and leave, validation included"
    torch.manual_seed(5)
    res = [[batch(b) for b in o] for _ in range(n) for o in (dl or dls.train, dls.valid)]
    return res, [dls.train.rng.getstate(), torch.get_rng_state().tolist(), dls.bad_files.state_dict()]


def assert_same(a, b):
    assert a[1]==b[1]
    assert [[len(x) for x in e] for e in a[0]]==[[len(x) for x in e] for e in b[0]]
    assert all(torch.equal(x, y) for d, e in zip(a[0], b[0]) for f, g in zip(d, e) for x, y in zip(f, g))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kwargs', [{}, dict(drop_last=False), dict(valid_pct=.3)])
def test_the_same_with_and_without(photos, workers, kwargs):
    plain, cached = (loaders(photos, cache, workers, **kwargs) for cache in (False, None))
    assert plain.train.kept is None and cached.train.kept is not None
    assert_same(epochs(cached), epochs(plain))
    canvas = cached.train.kept.canvas
    assert canvas.shape==(len(cached.train_ds), 3, 32, 32) and canvas.dtype==torch.uint8


def count_reads(monkeypatch):
    "Files that are read in this process"
    read, real = [], canvases.load_canvas
    monkeypatch.setattr(canvases, 'load_canvas', lambda path, *args: (read.append(path.name), real(path, *args))[1])
    return read


def test_a_photograph_is_decoded_once(photos, monkeypatch):
    dls = loaders(photos, True, drop_last=False)
    read = count_reads(monkeypatch)
    for _ in range(3): list(dls.train)
    often = {o for o in set(read) if read.count(o)>1}
    assert read.count('00.png')==1 and read.count('long.png')==3 and read.count('bad.jpg')==3
    assert 'twice.png' in often and len(often)<=6                           # as long as a window, so taken for one; two stand in for bad ones


def test_no_processes_when_all_is_there(photos, tmp_path, monkeypatch):
    "From the second epoch on; of the other folder more than one photograph in a hundred is read in every epoch"
    for i in range(12): Image.open(photos/f'{i:02}.png').save(tmp_path/f'{i}.png')
    dls, started = loaders(tmp_path, None, 2), []
    real = data.ViewLoader.create_batches
    def create_batches(self, samps):
        if self is dls.train: started.append(1)                              # in this process
        return real(self, samps)
    monkeypatch.setattr(ViewLoader, 'create_batches', create_batches)
    got = epochs(dls)
    assert len(started)==3                                                   # of four epochs
    assert_same(got, epochs(loaders(tmp_path, False, 2)))
    dls = loaders(photos, None, 2)
    epochs(dls)
    assert dls.train.fake_l.num_workers==2


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('first', [0, 3])
def test_resumed_epochs(photos, workers, first):
    "The rest of an epoch, in a process that has kept canvases of epochs before it, or none"
    def begun(cache):
        dl = loaders(photos, cache, workers).train
        for _ in range(first): list(dl)
        return dl
    whole = iter(begun(False))
    for _ in range(2): next(whole)
    state = torch.get_rng_state()
    want = [batch(b) for b in whole]
    got = [batch(b) for b in rest_of_epoch(begun(None), 2, lambda: torch.set_rng_state(state))]
    assert len(got)==len(want)==2 and all(torch.equal(x, y) for a, b in zip(got, want) for x, y in zip(a, b))


def test_several_ranks(photos):
    "Each keeps what it has met"
    for rank in range(2):
        plain, cached = (loaders(photos, cache, 2, drop_last=False) for cache in (False, None))
        got = epochs(cached, 5, RankLoader(cached.train, rank, 2))
        assert_same(got, epochs(plain, 5, RankLoader(plain.train, rank, 2)))
        assert cached.train.kept.there.sum()>N//2+2


def test_a_rank_needs_no_processes(photos, tmp_path):
    for i in range(12): Image.open(photos/f'{i:02}.png').save(tmp_path/f'{i}.png')
    dls = loaders(tmp_path, None, 1)
    dl = RankLoader(dls.train, 0, 2)
    epochs(dls, 6, dl)
    assert dl.fake_l.num_workers==0


def test_what_a_user_changes_of_items_is_done_in_every_epoch(photos):
    dls = loaders(photos, True)
    list(dls.train)
    dls.train.after_item = lambda o: (255-o[0], *o[1:])
    plain = loaders(photos, False)
    plain.train.after_item = dls.train.after_item
    list(plain.train)
    assert_same(epochs(dls), epochs(plain))


def test_another_data_set_has_canvases_of_its_own(photos):
    dls = loaders(photos, True, valid_pct=.3)
    for dl in dls.loaders: list(dl)
    other = dls.train.new(dataset=dls.valid_ds, shuffle=False, bs=3)
    assert other.kept is None
    torch.manual_seed(0)
    got = batch(next(iter(other)))
    plain = loaders(photos, False, valid_pct=.3)
    torch.manual_seed(0)
    assert all(torch.equal(x, y) for x, y in zip(got, batch(next(iter(plain.train.new(dataset=plain.valid_ds, shuffle=False, bs=3))))))


def test_memory_decides_and_says_so(photos, monkeypatch, capsys):
    need = 3*32*32*N
    monkeypatch.setattr(kept, '_say', lambda what, n, size: print(what, n, size))
    for free, keeps in ((2*need, True), (2*need-1, False)):
        monkeypatch.setattr(kept, 'free_memory', lambda: free)
        assert (loaders(photos, None).train.kept is not None)==keeps
        said = capsys.readouterr().out
        assert said.startswith('canvases kept in memory as they are decoded' if keeps else 'canvases decoded in every epoch') and said.endswith(f'{N} {need}\n')
    assert loaders(photos, True).train.kept is not None
    monkeypatch.setattr(kept, 'free_memory', lambda: need-1)
    with pytest.raises(InputError, match='cache=True would keep 23 canvases'): loaders(photos, True)
    monkeypatch.setattr(kept, 'free_memory', lambda: 2*need)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert loaders(photos, None).train.kept is None                         # another process of this machine wants as much


# ---- drawn scenes

def test_scenes_come_as_one_tensor():
    "As item by item"
    def run(by_item):
        dls = scene_dls(14, RECIPE, bs=4, canvas=40, seed=2, device='cpu', num_workers=0)
        if by_item: dls.train.create_batches = lambda samps: DataLoader.create_batches(dls.train, samps)
        return epochs(dls, 2)
    assert_same(run(False), run(True))


# ---- processes that decode

def test_processes_by_cores(monkeypatch):
    gpu, cpu = torch.device('cuda'), torch.device('cpu')
    monkeypatch.setattr(data.defaults, 'cpus', 16)
    assert [n_workers(o, 0, shm='/nowhere') for o in (gpu, cpu)]==[15, 8]
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert n_workers(gpu, 0, shm='/nowhere')==3
    monkeypatch.setattr(data.defaults, 'cpus', 1)
    assert [n_workers(o, 0, shm='/nowhere') for o in (gpu, cpu)]==[1, 0]


def test_processes_by_shared_memory(monkeypatch, tmp_path):
    "A container of 64 MB: two batches of 64 canvases for each process"
    monkeypatch.setattr(data.defaults, 'cpus', 16)
    class Place: f_blocks, f_frsize = 16384, 4096
    monkeypatch.setattr(data.os, 'statvfs', lambda path: Place)
    with pytest.warns(UserWarning, match='^2 instead of 15 processes decode: /dev/shm holds 0.07 GB, and each needs 0.03'):
        assert n_workers(torch.device('cuda'), 3*64*256**2)==2
    with pytest.warns(UserWarning, match='^0 instead of 15'): assert n_workers(torch.device('cuda'), 3*512*256**2)==0


# ---- on a GPU

@pytest.mark.skipif(torch.cuda.is_available(), reason='pretends to have a GPU')
@pytest.mark.parametrize('free,moves', [(2, True), (1.9, False)])
def test_on_a_gpu(photos, free, moves, monkeypatch, tmp_path):
    "They move there when the second epoch begins, if there is room; batches are looked up without a wait, and the views are the same"
    for i in range(12): Image.open(photos/f'{i:02}.png').save(tmp_path/f'{i}.png')
    need = 3*32*32*12
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (int(free*need), 0))
    def run(cache):
        dls, seen = loaders(tmp_path, cache, device='cuda', pin_memory=False), []
        torch.manual_seed(5)
        with gpu.counted() as first: res = [batch(b) for b in dls.train]
        for _ in range(2):
            with gpu.counted() as c: res += [batch(b) for b in dls.train]
            seen.append(c)
        return dls, [[x.inner if isinstance(x, OnGPU) else x for x in b] for b in res], first, seen
    with pretend_gpu() as gpu:
        plain, cached = run(False), run(None)
    assert all(torch.equal(x, y) for a, b in zip(plain[1], cached[1]) for x, y in zip(a, b))
    store = cached[0].train.kept.canvas
    assert isinstance(store, OnGPU)==moves and len(cached[1])==6
    for count in cached[3][1:]:                 # from the third epoch on nothing is new
        assert not count.waits
        assert sum(count.copies.values())==sum(plain[3][1].copies.values())       # numbers in place of canvases


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('room', [True, False])
def test_on_a_real_gpu(photos, room, monkeypatch, tmp_path):
    "The same batches with canvases on the GPU, or pinned; and with processes in the first epoch"
    for i in range(12): Image.open(photos/f'{i:02}.png').save(tmp_path/f'{i}.png')
    if not room: monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (0, 0))
    plain, cached = (loaders(tmp_path, cache, 2, device='cuda') for cache in (False, None))
    assert_same(epochs(cached), epochs(plain))
    assert cached.train.kept.canvas.is_cuda==room
