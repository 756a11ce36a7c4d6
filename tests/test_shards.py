"Tar shards: the same photographs as from the folder, each once, in an order that can be entered anywhere; and lists with holes"
import hashlib
import io
import json
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from densessl.data import shards as S
from densessl.data.folders import find_images
from densessl.data.images import image_dls
from densessl.data.photographs import load_canvas
from densessl.data.shards import is_shards, shard_dls, shard_list, write_shards
from densessl.data.tar_files import tar_photographs
from densessl.data.views import CropSpec, Recipe
from densessl.ground.commands import densessl_shard
from densessl.ground.core import InputError
from densessl.ground.synthetic import draw_scenes
from processes import run_script

RECIPE = Recipe((CropSpec('teacher', 32, (.8, 1.)), CropSpec('local', 16, (.05, .4), within='teacher', count=2)))
N, PER = 43, 6


def digest(x): return hashlib.md5(x.contiguous().numpy().tobytes()).hexdigest()[:8]


def held(path): return [(name, open(path, 'rb').read()[first:first+n]) for name, first, n in tar_photographs(path)]


def names(path): return [o[0] for o in tar_photographs(path)]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    d = tmp_path_factory.mktemp('photos')
    for i, x in enumerate(draw_scenes(N, 48)[0]): Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()).crop((0, 0, 48-i % 5, 40)).save(d/f'{i:02}.jpg')
    return d


@pytest.fixture(scope='module')
def tars(photos, tmp_path_factory):
    "Eight shards of six photographs, the last of one"
    out = tmp_path_factory.mktemp('tars')/'out'
    write_shards(photos, out, per_shard=PER, workers=0)
    return out


@pytest.fixture
def own(tars, tmp_path):
    "A copy to spoil"
    shutil.copytree(tars, tmp_path/'tars')
    return tmp_path/'tars'


def loaders(where, workers=0, bs=2, shuffle=8, **kw):
    return shard_dls(where, RECIPE, bs=bs, num_workers=workers, device='cpu', shuffle=shuffle, cache=False, **kw)


def batches(dls, dl=None):
    "An epoch as lists of digests, the notes collected"
    dl = dl or dls.train
    after, bad = dl.after_batch, dls.bad_files
    dl.after_batch = lambda b: (bad.add(b[2]), [digest(x) for x in b[0]])[1]
    try: return list(dl)
    finally: dl.after_batch = after


def flat(o): return [x for b in o for x in b]


@pytest.fixture(scope='module')
def want(photos): return sorted(digest(load_canvas(f, 32)[0]) for f in find_images(photos))


# ---- the same photographs, each once

@pytest.mark.parametrize('workers', [0, 2])
def test_same_pixels_as_the_folder(photos, tars, want, workers):
    dls = loaders(tars, workers, bs=4, drop_last=False)
    got = batches(dls)
    assert sorted(flat(got)) == want and len(got) == len(dls.train) == 11 and [len(b) for b in got] == [4]*10+[3]
    folder = image_dls(photos, RECIPE, bs=4, num_workers=0, device='cpu').train_ds
    items = [dls.train_ds[i] for i in range(N)]
    assert {(digest(x), tuple(hw.tolist())) for x, hw, _ in items} == {(digest(folder[i][0]), tuple(folder[i][1].tolist())) for i in range(N)}
    assert digest(dls.train_ds[40][0]) == digest(items[40][0]) and digest(dls.train_ds[3][0]) == digest(items[3][0])      # not in a row
    with pytest.raises(IndexError): dls.train_ds[N]


def test_views_are_those_of_the_folder(photos, tars):
    "The recipe sees the same canvas, so with torch's seed the views are equal too"
    a, b = image_dls(photos, RECIPE, bs=2, num_workers=0, device='cpu'), shard_dls(tars, RECIPE, bs=2, num_workers=0, device='cpu')
    assert b.recipe is RECIPE and b.bad_files == [] and len(b.train) == len(a.train) == 21 and b.bs == 2 and len(b.valid) == 0
    by = {digest(a.train_ds[i][0]): a.train_ds[i] for i in range(N)}
    item = b.train_ds[5]
    out = []
    for o in (item, by[digest(item[0])]):
        torch.manual_seed(0); out.append(a.train.after_batch((o[0][None], o[1][None], [''])))
    assert all(torch.equal(out[0][0][k].images, out[1][0][k].images) and torch.equal(out[0][0][k].boxes, out[1][0][k].boxes) for k in out[0][0])


@pytest.mark.parametrize('ranks,workers,bs', [(1, 2, 2), (2, 0, 3), (3, 2, 2), (7, 0, 3), (20, 0, 2)])
def test_each_once_over_ranks_and_workers(tars, want, monkeypatch, ranks, workers, bs):
    "Also where ranks do not divide the shards, or outnumber them"
    from densessl.training import distributed as D
    monkeypatch.setattr(D, 'from_first_rank', lambda f: f())
    got = []
    for r in range(ranks):
        dls = loaders(tars, workers, bs=bs)
        dls.train.after_batch = lambda b: [digest(x) for x in b[0]]
        part = D.RankLoader(dls.train, r, ranks)
        got.append(list(part))
        assert len(got[-1]) == len(part) == N//(ranks*bs)
    seen = flat(flat(got))
    assert len(set(seen)) == len(seen) == N//(ranks*bs)*ranks*bs and set(seen) <= set(want)


def test_orders(tars):
    a = loaders(tars)
    first, second = batches(a), batches(a)
    plain = [digest(a.train_ds[i][0]) for i in range(42)]
    assert first != second and sorted(flat(first)) != flat(first) and flat(first) != plain
    assert batches(loaders(tars)) == first == batches(loaders(tars, 3)) and batches(loaders(tars, seed=1)) != first
    assert flat(batches(loaders(tars, shuffle=0))) == plain       # as in the tar files


def test_shuffled_within_and_between_shards(tars):
    "A block holds its photographs in another order than the shard; the shards come in another order each epoch"
    dls = loaders(tars, shuffle=PER)
    place = {digest(dls.train_ds[i][0]): i for i in range(N)}
    epochs = [[place[x] for x in flat(batches(dls))] for _ in range(4)]
    assert len({tuple(dict.fromkeys(i//PER for i in e)) for e in epochs}) == 4
    assert all(any(e[k:k+PER] != sorted(e[k:k+PER]) for k in range(0, 36, PER)) for e in epochs)
    assert all(len({i//PER for i in e[k:k+PER]}) <= 2 for e in epochs for k in range(0, 42, PER))      # what is read together lies together


def test_validation_images_are_apart(tars, want):
    dls = loaders(tars, valid_pct=.3, drop_last=False)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (31, 12)
    train, valid = flat(batches(dls)), [flat(batches(dls, dls.valid)) for _ in range(2)]
    assert sorted(train+valid[0]) == want and valid[0] == valid[1]


def test_kept_canvases_give_the_same(tars):
    "Decoded once or in every epoch, the same views"
    def epochs(cache):
        dls = shard_dls(tars, RECIPE, bs=4, num_workers=0, device='cpu', cache=cache)
        torch.manual_seed(0)
        return dls, [digest(v['local'].images) for _ in range(3) for v, _ in dls.train]
    (a, kept), (b, decoded) = epochs(True), epochs(False)
    assert kept == decoded and a.train.kept.there.any() and b.train.kept is None


def test_learner_trains_on_shards(tars, tmp_path):
    "The same learner, views to look at, plain `fit`"
    import densessl.training.pictures       # gives a learner `show_views`
    from densessl.methods.flsl import FLSLConfig, flsl_recipe
    from densessl.training.learner import flsl_learner
    c = FLSLConfig(img_size=32, n_prototypes=16)
    dls = shard_dls(tars, flsl_recipe(c), bs=4, num_workers=1, device='cpu', valid_pct=.2)
    learn = flsl_learner(dls, 'vit_tiny_patch16_224', c, model_kwargs=dict(patch_size=8, embed_dim=24, depth=1, num_heads=3), path=tmp_path)
    with learn.no_logging(): learn.fit(2)
    assert len(learn.recorder.losses) == 2*len(dls.train) == 16
    assert learn.show_views(2) is not None


# ---- resuming

@pytest.mark.parametrize('workers', [0, 2])
def test_resume_at_any_batch(tars, workers):
    "`rest_of_epoch` of the checkpoints, which sets the generator: the rest of the epoch, and the next one, with any number of workers"
    rest = pytest.importorskip('densessl.data.order').rest_of_epoch
    dls = loaders(tars)
    batches(dls); state = dls.train.rng.getstate(); full, then = batches(dls), batches(dls)
    for stop in (1, 8, 20):
        new = loaders(tars, workers); new.train.rng.setstate(state)
        new.train.after_batch = lambda b: [digest(x) for x in b[0]]
        called = []
        assert list(rest(new.train, stop, lambda: called.append(1))) == full[stop:] and called
        assert list(new.train) == then and new.train.rng.getstate() == dls.train.rng.getstate()


# ---- what is in tar files

def tar_of(path, members, mode='w', fmt=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=fmt) as t:
        for name, b in members:
            m = tarfile.TarInfo(name); m.size = len(b); t.addfile(m, io.BytesIO(b))


@pytest.mark.parametrize('fmt', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_files_of_others(photos, tmp_path, fmt):
    "Labels, captions, folders, links, hidden and foreign files are passed over, names may be anything; with a plain list or none"
    raw = [f.read_bytes() for f in find_images(photos)[:6]]
    for k in range(2):
        mine = raw[3*k:3*k+3]
        tar_of(tmp_path/f'{k:05}.tar', [('a/0001.jpg', mine[0]), ('a/0001.json', b'{}'), ('a/0001.txt', b'a scene'), ('._0002.jpg', b'mac'), ('a/b c\n.\u00e9.JPG', mine[1]),
                                        (f'{"long"*30 if fmt != tarfile.USTAR_FORMAT else "x"}.jpeg', mine[2]), ('0003.cls', b'7')], fmt=fmt)
    found = shard_list(tmp_path)
    assert [o.n for o in found] == [3, 3] and [o.read(i) for o in found for i in range(3)] == raw and is_shards(tmp_path)
    sizes = tmp_path/'sizes.json'; sizes.write_text(json.dumps({f'{k:05}.tar': 3 for k in range(2)}))
    assert [o.path for o in shard_list(sizes)] == [o.path for o in found]
    dls = loaders(tmp_path, bs=3); assert len(flat(batches(dls))) == 6 and dls.bad_files == []


@pytest.mark.parametrize('ending,mode', [('tar.gz', 'w:gz'), ('tgz', 'w:gz'), ('tar.bz2', 'w:bz2'), ('tar.xz', 'w:xz')])
def test_compressed_tar_files_are_refused(photos, tmp_path, ending, mode):
    tar_of(tmp_path/f'0.{ending}', [(f.name, f.read_bytes()) for f in find_images(photos)[:2]], mode)
    assert is_shards(tmp_path)
    refused('is compressed, so that no photograph in it can be read by itself: unpack it with gunzip', tmp_path)


def test_shards_without_places_in_their_list(tars, own, want):
    "As an earlier densessl wrote them: the headers are read, and nothing else differs"
    d = json.loads((own/'index.json').read_text())
    for o in d['shardlist']: del o['places']
    (own/'index.json').write_text(json.dumps(d))
    a, b = shard_list(tars), shard_list(own)
    assert [o.places.tolist() for o in a] == [o.places.tolist() for o in b]
    assert batches(loaders(tars)) == batches(loaders(own))
    assert loaders(tars).train_ds.identity() == loaders(own).train_ds.identity() != loaders(tars, valid_pct=.1).train_ds.identity()


def test_listed_places_are_used(own, monkeypatch):
    "No header is read where the list says where the photographs are"
    monkeypatch.setattr(S, 'tar_photographs', lambda *a: pytest.fail('read'))
    assert sum(o.n for o in shard_list(own)) == N


def test_webdataset_reads_ours(tars):
    "An independent reader"
    WebDataset = pytest.importorskip('webdataset').WebDataset
    urls = str(tars/'shard-{000000..000007}.tar')
    theirs = [(o['__key__'], o['jpg']) for o in WebDataset(urls, shardshuffle=False)]
    assert theirs == [(n.removesuffix('.jpg'), b) for o in shard_list(urls) for n, b in held(o.path)] and len(theirs) == N


@pytest.mark.parametrize('url', ['https://example.com/photos.zip', 's3://bucket/photos', 'file:///home/me/photos', 'pipe:cat 0.tar', ['0.tar', 'https://a.b/1.tar']])
def test_what_is_elsewhere_is_to_be_copied(url):
    refused('is not on this machine: copy the tar files here, or mount the place', url)


# ---- holes

def refused(match, *args, **kw):
    with pytest.raises(InputError, match=match) as e: shard_list(*args, **kw)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_lists_with_holes(own):
    urls = [o.path for o in shard_list(own)]
    refused("has a hole, 'shard-000003.tar' is missing and 1 more", [o for i, o in enumerate(urls) if i not in (3, 5)])
    assert len(shard_list([o for i, o in enumerate(urls) if i != 3], holes=True)) == 7
    refused('is listed twice', [*urls, urls[2]])
    refused("shard-000008.tar' does not exist", str(own/'shard-{000006..000009}.tar'), holes=True)
    refused('the list of shards is empty', [])
    refused('cannot be used as a list of shards .no such file', own/'nothing.json')
    (own/'other.json').write_text('{"photo.jpg": 3}'); refused('cannot be used as a list of shards', own/'other.json')
    (own/'shard-000008.tar').write_bytes((own/'shard-000000.tar').read_bytes())
    refused("holds 'shard-000008.tar', which its index.json does not list", own); (own/'shard-000008.tar').unlink()
    (own/'shard-000004.tar').unlink()
    refused("shard-000004.tar' does not exist", own)
    (own/'index.json').unlink()
    refused("has a hole, 'shard-000004.tar' is missing", own)
    (own/'index.json.part').touch()
    refused('was not finished by densessl_shard', own)
    for f in own.iterdir(): f.unlink()
    refused('holds no shards', own)


def test_truncated_and_changed_before_the_start(own):
    f = own/'shard-000002.tar'; whole = f.read_bytes()
    for cut in (len(whole)-100, len(whole)//2, 700, 0):
        f.write_bytes(whole[:cut])
        refused(f"shard-000002.tar' has {cut} bytes but its list says {len(whole)}", own)
    (own/'index.json').unlink()
    with tarfile.open(f, 'w') as t: pass
    assert tar_photographs(f) == []
    ends = [m.offset for m in members(whole)]
    for cut in (len(whole)//2, ends[2], ends[3]+100, 3, 0):                        # also exactly between two members
        f.write_bytes(whole[:cut])
        refused("shard-000002.tar' is cut short or damaged", own)
    f.write_bytes(b'this is a letter\n'*100)
    refused("shard-000002.tar' is cut short or damaged", own)


def members(raw):
    with tarfile.open(fileobj=io.BytesIO(raw)) as t: return t.getmembers()


def spoil(own, k, b):
    "Change a shard behind the back of a list that was checked already"
    (own/f'shard-{k:06}.tar').write_bytes(b)


@pytest.mark.parametrize('workers', [0, 2])
def test_shards_that_break_while_training(own, want, workers):
    "Cut off, gone, replaced by another file: their photographs are noted one by one and others take their places, in whole batches"
    dls = loaders(own, workers, max_bad=1.)
    paths = [o.path for o in dls.train_ds.shards]
    half = (own/'shard-000001.tar').read_bytes()
    spoil(own, 1, half[:members(half)[3].offset_data+30]); spoil(own, 4, b'no tar'); (own/'shard-000006.tar').unlink()
    full = [batches(dls) for _ in range(2)]
    lost = {k: sum(str(o).startswith(paths[k]) for o in dls.bad_files) for k in range(8)}
    assert lost == {0: 0, 1: 3, 2: 0, 3: 0, 4: 6, 5: 0, 6: 6, 7: 0}, dls.bad_files.report()
    reasons = {k.rpartition('/')[0]: v for k, v in dls.bad_files.reasons.items()}
    assert reasons == {paths[1]: 'the tar file ends before it', paths[4]: 'the tar file ends before it', paths[6]: 'no such file or directory'}
    assert all(len(b) == 2 for b in full[0]) and len(full[0]) == 21 and set(flat(full[0])) <= set(want) and len(set(flat(full[0]))) >= 43-15-2
    with pytest.raises(InputError, match='more than max_bad=0.1 allows'): batches(loaders_of_spoiled(dls))


def loaders_of_spoiled(dls):
    "The same loaders with a smaller allowance"
    dls.bad_files.clear(); dls.bad_files.reasons.clear()
    dls.bad_files.seen, dls.bad_files.max_bad = 0, .1
    return dls


def test_bad_photographs_inside(own):
    "A text named .jpg in a shard gives place to another and is named with its shard"
    for k in (0, 3): tar_of(own/f'shard-{k:06}.tar', [('x.jpg', b'oops'), *[(f'{i}.jpg', (own/'b.jpg').read_bytes()) for i in range(5) if (own/'b.jpg').exists() or not SCENE.save(own/'b.jpg')]])
    (own/'b.jpg').unlink(); (own/'index.json').unlink()
    dls = shard_dls(own, RECIPE, bs=2, num_workers=2, device='cpu', shuffle=8, drop_last=False)
    for _ in range(2): assert all(torch.isfinite(v['local'].images).all() for v, _ in dls.train)
    assert sorted(dls.bad_files) == [f'{own}/shard-{k:06}.tar/x.jpg' for k in (0, 3)] and set(dls.bad_files.reasons.values()) == {'not an image'}
    with pytest.raises(InputError, match='more than max_bad=0 allows'): batches(loaders(own, max_bad=0.))


SCENE = Image.new('RGB', (20, 10), (9, 99, 199))


def test_nothing_readable(tmp_path):
    for k in range(2): tar_of(tmp_path/f'{k}.tar', [(f'{i}.jpg', b'x') for i in range(3)])
    with pytest.raises(InputError, match='none of the 6 images can be read, the first is .*0.tar/0.jpg. .not an image.'): shard_dls(tmp_path, RECIPE, bs=2, num_workers=0, device='cpu')


def test_arguments(tars):
    for match, kw in (('bs must be', dict(bs=1)), ('bs is 64 but there are only 43', dict(bs=64)), ('valid_pct must lie', dict(valid_pct=1.)), ('canvas must be', dict(canvas=0)),
                      ('shuffle must be', dict(shuffle=-1)), ('max_bad is a share', dict(max_bad=2.))):
        with pytest.raises(InputError, match=match): shard_dls(tars, RECIPE, **(dict(bs=2, num_workers=0, device='cpu') | kw))
    assert is_shards(tars) and is_shards('https://a.b/x.tar') and is_shards([1]) and is_shards('a/{0..3}.tar') and is_shards(tars/'index.json') and not is_shards(tars.parent) and not is_shards('nowhere')


# ---- writing

def jpeg(path):
    with Image.open(path) as im: return im.size, im.quantization[0]


def test_resizing(tmp_path):
    "The shorter side at most `size`, upright, JPEG of the quality asked for; what is small stays as it is, byte for byte"
    src = tmp_path/'src'; src.mkdir()
    big = Image.fromarray(draw_scenes(1, 256)[0][0].permute(1, 2, 0).contiguous().numpy()).crop((0, 0, 256, 160))
    exif = Image.Exif(); exif[0x0112] = 6
    big.transpose(Image.Transpose.ROTATE_90).save(src/'turned.jpg', exif=exif, quality=95); big.save(src/'big.png'); big.save(src/'big.tif')
    big.resize((80, 50)).save(src/'small.PNG'); Image.new('RGB', (3000, 64)).save(src/'long.bmp'); Image.new('L', (1, 1)).save(src/'dot.gif'); (src/'bad.jpg').write_text('oops')
    d = write_shards(src, tmp_path/'out', size=64, quality=80, workers=0)
    got = held(tmp_path/'out'/'shard-000000.tar')
    kinds = sorted((n.rpartition('.')[2], Image.open(io.BytesIO(b)).size) for n, b in got)
    assert kinds == [('bmp', (3000, 64)), ('gif', (1, 1)), ('jpg', (102, 64)), ('jpg', (102, 64)), ('jpg', (102, 64)), ('png', (80, 50))]
    assert (d['images'], [Path(f).name for f, _ in d['left_out']], d['left_out'][0][1]) == (6, ['bad.jpg'], 'not an image')
    for n, b in got:
        if n.endswith('jpg'):
            ref = io.BytesIO(); SCENE.save(ref, 'JPEG', quality=80)
            assert jpeg(io.BytesIO(b)) == ((102, 64), jpeg(ref)[1])
            assert (load_canvas(io.BytesIO(b), 32)[0].float()-load_canvas(src/'big.png', 32)[0]).abs().mean() < 8        # the same picture, upright
        else: assert b in [f.read_bytes() for f in src.iterdir()]


def test_same_shards_whatever_the_workers(photos, tmp_path, tars):
    for w in (0, 2): write_shards(photos, tmp_path/f'{w}', per_shard=10, workers=w, seed=3)
    for f in (tmp_path/'0').iterdir(): assert f.read_bytes() == (tmp_path/'2'/f.name).read_bytes()
    order = [b for o in shard_list(tmp_path/'0') for _, b in held(o.path)]
    assert [o.n for o in shard_list(tmp_path/'0')] == [10, 10, 10, 10, 3] and order != [f.read_bytes() for f in find_images(photos)] and order != [b for o in shard_list(tars) for _, b in held(o.path)]


def test_nothing_is_overwritten_and_nothing_half_done(photos, tmp_path, monkeypatch):
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'precious.txt').write_text('keep'); (tmp_path/'file').write_text('keep')
    for o in ('full', 'file'):
        with pytest.raises(InputError, match=f"{o}' exists already and is not an empty folder"): write_shards(photos, tmp_path/o, workers=0)
    (tmp_path/'none').mkdir(); (tmp_path/'none'/'a.jpg').write_text('x')
    with pytest.raises(InputError, match='none of the 1 images .* can be read, the first is .*a.jpg. .not an image'): write_shards(tmp_path/'none', tmp_path/'out0', workers=0)
    assert not (tmp_path/'out0').exists()
    for match, kw in (('size must be a whole number, at least 1, got 0', dict(size=0)), ('quality must be a whole number, at least 1 and at most 95, got 99', dict(quality=99)), ('per_shard', dict(per_shard=0)), ('the number of workers must be a whole number, at least 0, got -1', dict(workers=-1))):
        with pytest.raises(InputError, match=match): write_shards(photos, tmp_path/'out0', **(dict(workers=0) | kw))
    calls, real = [], os.fsync
    for error, raised, match in ((OSError(28, 'No space left on device'), InputError, 'cannot write to .*out.*: no space left on device'), (KeyboardInterrupt(), KeyboardInterrupt, None)):
        def full(fd, error=error):
            calls.append(fd)
            if len(calls) % 5 == 0: raise error          # the third file: after each one the folder is written too
            real(fd)
        monkeypatch.setattr(os, 'fsync', full)
        out = tmp_path/f'out{raised.__name__}'
        with pytest.raises(raised, match=match): write_shards(photos, out, per_shard=10, workers=0)
        assert sorted(f.name for f in out.iterdir()) == ['index.json.part', 'shard-000000.tar', 'shard-000001.tar']
        refused('was not finished by densessl_shard: write it again', out)
        assert is_shards(out)


SCRIPT = 'import sys\nfrom densessl.ground.commands import densessl_shard\nsys.exit(densessl_shard())\n'


def run(*args):
    env = os.environ | dict(PYTHONWARNINGS='ignore::FutureWarning')
    home = Path(args[1]).parent
    (home/'script.py').write_text(SCRIPT)
    return run_script(home/'script.py', args, home, env)


def test_command(photos, tmp_path):
    src = tmp_path/'some photos'; shutil.copytree(photos, src)
    with open(os.path.join(os.fsencode(src), b'bad \xff\n.jpg'), 'wb') as f: f.write(b'oops')
    r = run(src, tmp_path/'out', '--size', 32, '--per_shard', 20, '--workers', 1)
    assert r.returncode == 0 and r.stderr == '', r.stderr
    lines = r.stdout.splitlines()
    assert lines[0].startswith(f'{N} photographs in 3 shards, ') and lines[1].startswith('1 files could not be read and were left out') and lines[2].endswith('bad \\udcff\\n.jpg: not an image') and len(lines) == 3
    assert [o.n for o in shard_list(tmp_path/'out')] == [20, 20, 3] and len(batches(loaders(tmp_path/'out'))) == 21


def test_command_with_bad_input(photos, tmp_path, capsys):
    "One sentence as the exit of the process, nothing written (called from Python, the command is a function)"
    (tmp_path/'full').mkdir(); (tmp_path/'full/a').touch()
    for args, words in ((dict(folder='nowhere', out=tmp_path/'o'), ("'nowhere'", 'does not exist')), (dict(folder=photos, out=tmp_path/'full'), (str(tmp_path/'full'), 'not an empty folder')),
                        (dict(folder=photos, out=tmp_path/'o', size=0), ('size', '0')), (dict(folder=photos, out=tmp_path/'full/a/b'), ('cannot be written', 'is a file'))):
        with pytest.raises(SystemExit) as e: densessl_shard(**args, workers=0)
        assert e.value.code.startswith('densessl_shard: ') and '\n' not in e.value.code and all(w in e.value.code for w in words), e.value.code
    assert not (tmp_path/'o').exists() and capsys.readouterr() == ('', '')


# ---- what is ours, and what is not

def image(fmt='JPEG', mode='RGB'):
    b = io.BytesIO(); SCENE.convert(mode).save(b, fmt)
    return b.getvalue()


KEYS = {
    'x.jpg': ['{}.depth.png', '{}.jpg', '{}.json', '{}.seg.png'], 'x.png': ['{}.mask.png', '{}.png'], 'both': ['{}.jpg', '{}.png'],
    'named': ['{}.image.png', '{}.segmentation.png'], 'folders': ['images/{}.jpg', 'masks/{}.png'], 'unknown': ['{}.jpg', '{}.left.jpg'],
}


@pytest.mark.parametrize('kind', KEYS)
def test_one_photograph_a_key(tmp_path, kind):
    "Masks and depth maps under the key of a photograph are left out and said, in whatever order"
    members = [(o.format(i), image('PNG') if o.endswith('png') else image()) for i in range(6) for o in KEYS[kind]]
    tar_of(tmp_path/'0.tar', members)
    want = [o for o, _ in members if o in {KEYS[kind][{'x.jpg': 1, 'x.png': 1}.get(kind, 0)].format(i) for i in range(6)}]
    data = dict(members)
    assert held(tmp_path/'0.tar') == [(o, data[o]) for o in want] and len(want) == 6
    with pytest.warns(UserWarning, match=r'\d+ images of the shards are left out: masks, depth maps or further images of a key, beside 6 photographs'): found = shard_list(tmp_path)
    assert found[0].n == 6 and [found[0].name(i) for i in range(6)] == [f'{tmp_path}/0.tar/{o}' for o in want]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = loaders(tmp_path)
    assert len(flat(batches(dls))) == 6 and dls.bad_files == []


def test_dots_in_names_are_no_keys(tmp_path):
    "Photographs named by date, and masks without photographs, are all read as before"
    for k, wanted in enumerate((['IMG.2020.01.jpg', 'IMG.2020.02.jpg', 'IMG.2021.01.jpg'], ['0.seg.png', '1.seg.png'])):
        tar_of(tmp_path/f'{k}.tar', [(o, image()) for o in wanted])
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert shard_list(tmp_path/f'{k}.tar')[0].n == len(wanted) and names(tmp_path/f'{k}.tar') == wanted


@pytest.mark.parametrize('beside', ['tar', 'tar.gz of labels', 'index.json', 'list', 'broken json', 'part', 'all'])
def test_photographs_with_other_files_are_a_folder(tmp_path, beside):
    "Photographs are read, in subfolders too, whatever archive or index lies beside them"
    (tmp_path/'deep').mkdir()
    for i in range(4): (tmp_path/'deep'/f'{i}.jpg').write_bytes(image())
    if beside in ('tar', 'all'): tar_of(tmp_path/'download.tar', [('0.jpg', image())])
    if beside in ('tar.gz of labels', 'all'): tar_of(tmp_path/'labels.tar.gz', [('0.txt', b'x')], 'w:gz')
    if beside in ('index.json', 'all'): (tmp_path/'index.json').write_text('{"title": "holiday", "pages": [1, 2]}')
    if beside == 'list': (tmp_path/'index.json').write_text('[1, 2]')
    if beside == 'broken json': (tmp_path/'index.json').write_text('{"tit')
    if beside == 'part': (tmp_path/'index.json.part').write_text('')
    assert not is_shards(tmp_path) and not is_shards(str(tmp_path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert len(find_images(tmp_path)) == 4
    assert len(said) == (beside[:3] in ('tar', 'all')) and all('archives, give the path of a tar file, or of a folder of tar files' in str(o.message) for o in said)


def test_shards_with_other_files_are_shards(own):
    (own/'labels.json').write_text('[]')
    assert is_shards(own) and len(shard_list(own)) == 8
    (own/'preview.jpg').write_bytes(image())
    with pytest.warns(UserWarning, match='1 images beside the shards in .* are not read'): assert is_shards(own) and len(shard_list(own)) == 8
    (own/'preview.jpg').unlink()
    (own/'index.json').write_text('{"title": "holiday"}')
    with pytest.warns(UserWarning, match='index.json. is no list of shards and is not used'): assert is_shards(own) and sum(o.n for o in shard_list(own)) == N
    (own/'@eaDir').mkdir(); (own/'@eaDir'/'x.jpg').write_bytes(image())
    assert is_shards(own)


def test_tar_files_without_photographs(tmp_path):
    tar_of(tmp_path/'labels.tar', [('0.txt', b'x')])
    assert is_shards(tmp_path)
    refused('there is no photograph in .*labels.tar.: give tar files of images', tmp_path)
    assert not is_shards(tmp_path.parent/'nowhere')
    (tmp_path/'sub').mkdir(); (tmp_path/'sub'/'photos.tar').mkdir()
    assert not is_shards(tmp_path/'sub'/'photos.tar')                       # a folder, whatever its name


def test_home_is_expanded(tars, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tars.parent))
    assert is_shards('~/out') and len(shard_list('~/out')) == 8 and len(shard_list('~/out/shard-{000000..000007}.tar')) == 8
    assert len(shard_list(['~/out/shard-000000.tar', '~/out/shard-000001.tar'])) == 2
    d = tmp_path/'p'; d.mkdir(); (d/'a.jpg').write_bytes(image())
    monkeypatch.setenv('HOME', str(tmp_path))
    write_shards('~/p', '~/new', workers=0)
    assert (tmp_path/'new'/'index.json').exists()


def test_windows_of_panoramas_in_shards(tmp_path):
    "Other ones each epoch, whatever the number of workers; the middle one for validation"
    src = tmp_path/'src'; src.mkdir()
    for i in range(8): Image.fromarray(torch.cat([torch.full((10, 800), 30*i), torch.arange(800).expand(30, 800)//4]).byte().numpy()).save(src/f'{i}.png')
    write_shards(src, tmp_path/'out', per_shard=4, workers=0)
    def epochs(workers):
        dl, res = loaders(tmp_path/'out', workers).train, []
        dl.after_batch = lambda b: b
        for _ in range(2):
            res.append({})
            for c, hw, _ in dl:
                assert (hw == torch.tensor([40, 80])).all()
                res[-1] |= {round(x[0, 2].float().mean().item()/30): round(x[0, 20:].float().mean().item()) for x in c}
        return res
    a, b = epochs(0)
    assert a.keys() == b.keys() == set(range(8)) and sum(a[i] != b[i] for i in a) >= 7
    assert epochs(2) == [a, b]


def test_masks_named_after_their_photograph(tmp_path):
    tar_of(tmp_path/'0.tar', [(o, image('PNG' if o.endswith('png') else 'JPEG')) for i in range(4) for o in (f'{i}.jpg', f'{i}_mask.png')])
    with pytest.warns(UserWarning, match='4 images of the shards are left out'): assert shard_list(tmp_path/'0.tar')[0].n == 4
    assert names(tmp_path/'0.tar') == [f'{i}.jpg' for i in range(4)]


def test_masks_apart_from_their_photographs_are_said(tmp_path):
    tar_of(tmp_path/'0.tar', [(f'{i}.jpg', image()) for i in range(4)]+[(f'{i}.seg.png', image('PNG')) for i in range(4)])
    with pytest.warns(UserWarning, match='4 of 8 images of the shards are trained on though their names say mask'): shard_list(tmp_path/'0.tar')


@pytest.mark.parametrize('index', [dict(shardlist=[dict(url='0.tar', nsamples=4)]), [dict(url='0.tar', nsamples=4)], {'0.tar': 4}])
def test_what_is_left_out_is_said_with_an_index_too(tmp_path, index):
    tar_of(tmp_path/'0.tar', [(f'{i}.{o}', image()) for i in range(4) for o in ('jpg', 'depth.png')])
    (tmp_path/'index.json').write_text(json.dumps(index))
    with pytest.warns(UserWarning, match='4 images of the shards are left out: .* beside 4 photographs') as said: assert shard_list(tmp_path)[0].n == 4
    assert len(said) == 1


# ---- what other people's shards hold

@pytest.mark.parametrize('listed', [['00000.tar', '00001.tar', '00003.tar'], ['n01440764.tar', 'n01443537.tar', 'n15075141.tar']])
def test_numbers_of_others_may_have_gaps(tmp_path, listed):
    "img2dataset leaves shards out, and classes of ImageNet are no numbers: said or not, but never refused"
    for k, o in enumerate(listed): tar_of(tmp_path/o, [(f'{k}{i}.jpg', image()) for i in range(2)])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert [o.n for o in shard_list(tmp_path)] == [2, 2, 2]
    assert [str(o.message) for o in said] == ["the list of shards has a hole, '00002.tar' is missing: the others are trained on"]*listed[0].startswith('0')


def test_the_advice_on_a_hole_works(own):
    "Shards of densessl_shard are numbered without gaps; a JSON file of those to use is one path, for the command line too"
    (own/'shard-000003.tar').unlink()
    counts = {o.name: 3 for o in own.glob('*.tar')}
    (own/'index.json').unlink()
    with pytest.raises(InputError, match='or give a JSON file of the shards to use'): shard_list(own)
    (own/'mine.json').write_text(json.dumps(counts))
    assert len(shard_list(own/'mine.json')) == len(counts)


def test_stars_in_a_path(own):
    assert is_shards(f'{own}/*.tar') and [o.path for o in shard_list(f'{own}/*.tar')] == [o.path for o in shard_list(own)]
    with pytest.raises(InputError, match='the list of shards is empty'): shard_list(f'{own}/*.tgz')


@pytest.mark.parametrize('data,why', [(b'<html>403</html>', 'not a tar file but a web page'), (b'', 'empty file'), (b'PK\x03\x04', 'not a tar file but an archive: unpack it'),
                                      (b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'), (b'abc', 'not a tar file')])
def test_what_a_file_is_that_is_no_tar_file(tmp_path, data, why):
    (tmp_path/'0.tar').write_bytes(data)
    with pytest.raises(InputError, match='cut short or damaged') as e: shard_list(tmp_path/'0.tar')
    assert why in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 300


def test_what_is_not_read_in_shards_is_said(tmp_path):
    from densessl.data.photographs import IMAGE_SUFFIXES
    if '.heic' in IMAGE_SUFFIXES: pytest.skip('HEIC can be read here')
    tar_of(tmp_path/'0.tar', [(f'{i}.{o}', image()) for i in range(4) for o in ('heic', 'json')])
    with pytest.raises(InputError, match=r'there is no photograph in .*not read: 4 .heic \(install pillow-heif'): shard_list(tmp_path/'0.tar')
    tar_of(tmp_path/'1.tar', [(f'{i}.jpg', image()) for i in range(4)])
    with pytest.warns(UserWarning, match=r'in the shards: not read: 4 .heic'): assert sum(o.n for o in shard_list(tmp_path)) == 4


def test_what_looks_like_masks_is_said(tmp_path):
    "Two images of one key, `input` and `target`: both are read, as left and right would be, and the look at the first ones is told"
    flat, photo = io.BytesIO(), io.BytesIO()
    Image.new('L', (40, 30), 9).save(flat, 'PNG')
    Image.fromarray(draw_scenes(1, 48)[0][0].permute(1, 2, 0).numpy()).save(photo, 'JPEG')
    tar_of(tmp_path/'0.tar', [m for i in range(4) for m in ((f'{i}.input.jpg', photo.getvalue()), (f'{i}.target.png', flat.getvalue()))])
    with pytest.warns(UserWarning, match="4 of 8 images looked at have few colors, .* such as '.*0.tar/0.target.png'"): assert len(loaders(tmp_path).train_ds) == 8
