"Clips: frames stay together and in order through shuffling, resuming, several processes and the command"
import random

import pytest, torch
from PIL import Image

from densessl import cli
from densessl.data.clips import draw_clips
from densessl.data.images import image_dls, scene_dls
from densessl.data.order import rest_of_epoch
from densessl.data.shards import shard_dls
from densessl.data.views import CropSpec, Recipe
from densessl.ground.core import InputError
from densessl.methods.video import clip_recipe, crw_presets
from densessl.training.distributed import RankLoader
from densessl.training.learner import learner

RECIPE = Recipe((CropSpec('frames', 16, (1.,1.), (1.,1.), flip=0., augment=None),), frames=3)

def videos(folder, lengths=(7, 9, 6), size=20):
    "Frames whose color says which video (red) and which frame (green) they are"
    for v,n in enumerate(lengths):
        for t in range(n):
            (folder/f'v{v}').mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (size, size), (20+40*v, 10*t, 0)).save(folder/f'v{v}'/f'{t+1}.png')
    return folder

def shown(batch):
    "(video, frame) of each frame of each clip of a batch"
    x = batch[0]['frames'].images[:,:,:,8,8].cpu()*torch.tensor(RECIPE.std) + torch.tensor(RECIPE.mean)
    v, t, _ = (x*255).round().unbind(-1)
    return [[(round((a-20)/40), round(b/10)) for a,b in zip(*clip)] for clip in zip(v.T.tolist(), t.T.tolist())]

def check(clips):
    "Each is of one video, consecutive, and begins at a multiple of three"
    for clip in clips:
        (v, t), *_ = clip
        assert t%3==0 and clip==[(v, t+i) for i in range(3)], clip

def test_shuffled(tmp_path):
    dls = image_dls(videos(tmp_path), RECIPE, bs=6, num_workers=0, seed=1, device='cpu')
    assert dls.train.n==6+9+6
    epochs = [[c for b in dls.train for c in shown(b)] for _ in range(2)]
    for clips in epochs:
        check(clips)
        assert len(clips)==6 and len({c[0] for c in clips})==6
    assert epochs[0]!=epochs[1]

def test_valid(tmp_path):
    dls = image_dls(videos(tmp_path), RECIPE, bs=6, num_workers=0, seed=1, valid_pct=.3, device='cpu')
    train, valid = ([c for b in dl for c in shown(b)] for dl in (dls.train, dls.valid))
    check(train+valid)
    assert (dls.train.n, dls.valid.n)==(15, 6) and not {c[0] for c in train} & {c[0] for c in valid}

def test_rest_of_an_epoch(tmp_path):
    def loader(): return image_dls(videos(tmp_path), RECIPE, bs=6, num_workers=0, seed=1, device='cpu').train
    whole, rest = [shown(b) for b in loader()], [shown(b) for b in rest_of_epoch(loader(), 1, lambda: None)]
    assert rest==whole[1:]

def test_parts_of_processes(tmp_path):
    dl = image_dls(videos(tmp_path), RECIPE, bs=3, num_workers=0, seed=1, device='cpu').train
    state = dl.rng.getstate()
    parts = []
    for rank in range(2):
        dl.rng.setstate(state)
        parts.append([shown(b) for b in RankLoader(dl, rank, 2)])
    for part in parts: check([c for b in part for c in b])
    assert not {c[0] for b in parts[0] for c in b} & {c[0] for b in parts[1] for c in b}

def test_scenes():
    dls = scene_dls(18, RECIPE, bs=6, canvas=32, seed=4, noise=0.)
    frames = draw_clips(6, 3, 32, seed=4, noise=0.)[0]
    assert torch.equal(dls.train.dataset.images, frames.flatten(0, 1))
    dls.train.shuffle = False
    views = dls.train.one_batch()[0]['frames']
    assert tuple(views.images.shape)==(3, 2, 3, 16, 16)
    assert (views.images[0]-views.images[2]).abs().max()>.5

def test_errors(tmp_path):
    folder = videos(tmp_path/'videos')
    with pytest.raises(InputError, match='bs is 8, which is no multiple of the 3 frames of a clip: use 6 or 9'):
        image_dls(folder, RECIPE, bs=8, num_workers=0)
    with pytest.raises(InputError, match='no clip of 30 frames: the longest of 3 folders holds 9 images'):
        image_dls(folder, Recipe(RECIPE.crops, frames=30), bs=30, num_workers=0)
    import tarfile
    with tarfile.open(tmp_path/'shard.tar', 'w') as f:
        for p in sorted(folder.rglob('*.png')): f.add(p, p.name+f'{random.random()}.png')
    with pytest.raises(InputError, match='not from shards'): shard_dls(tmp_path/'shard.tar', RECIPE, bs=6, num_workers=0)
    photos = scene_dls(8, Recipe(clip_recipe(crw_presets['scenes']).crops), bs=4)
    with pytest.raises(InputError, match='crw trains on clips of 4 frames, the data has 1'): learner(photos, 'test_resnet', 'crw', 'scenes')

def test_command_on_videos(tmp_path, capsys):
    "From a folder of folders of frames to a backbone"
    clips = draw_clips(2, 9, 40, seed=3)[0]
    for v,video in enumerate(clips):
        (tmp_path/f'videos/{v}').mkdir(parents=True)
        for t,x in enumerate(video): Image.fromarray(x.permute(1,2,0).contiguous().numpy()).save(tmp_path/f'videos/{v}/{t:02}.jpg')
    cli.pretrain(tmp_path/'videos', method='crw', arch='test_resnet', model_kwargs='output_stride=8,stem_width=8,channels=[8,8,8,16]', bs=8,
                 epochs=1, img_size=32, settings='node_size=16,node_stride=8,out_dim=8', out=tmp_path/'out', workers=0)
    said = capsys.readouterr().out
    assert '16 photographs' in said and 'clips of 4 consecutive frames' in said and (tmp_path/'out/backbone.safetensors').exists()
