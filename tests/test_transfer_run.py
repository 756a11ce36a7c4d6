"The posters' rows as a user meets them: a run in small, stopped and resumed, its table, and wrong words"
import json, re

import pytest, torch
from PIL import Image

from densessl.ground.core import InputError
from densessl.ground.synthetic import CLASSES, draw_scenes
from densessl.evaluation.scores import read_scores
from densessl.methods.encoders import dense_encoder
from densessl.methods.export import export_backbone
from densessl.transfer import run
from densessl.transfer.posters import POSTER_ROWS, find_row

TINY = 'epochs=1,channels=16,hidden=16,n_regions=8'

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A backbone, and a folder with one label a pixel"
    home = tmp_path_factory.mktemp('transfer')
    torch.manual_seed(0)
    export_backbone(dense_encoder('test_resnet', 64), home/'backbone.safetensors')
    images, masks = draw_scenes(12, 64, seed=0)
    for i in range(12):
        part = 'train' if i%3 else 'val'
        for k in ('images', 'masks'): (home/'labelled'/k/part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(home/f'labelled/images/{part}/{i}.png')
        Image.fromarray(masks[i].byte().numpy()).save(home/f'labelled/masks/{part}/{i}.png')
    (home/'labelled/classes.txt').write_text('\n'.join(CLASSES)+'\n')
    return home

def values(out): return {(s.model, s.probe): s.value for s in read_scores(out/'scores.json')}

def small(home, out, **kwargs):
    return run.transfer('scenes', home/'backbone.safetensors', settings=TINY, limit=8, out=home/out, **kwargs)

def test_a_run_that_was_stopped_resumes(home, monkeypatch, capsys):
    "Stopped between the random start and the backbone: the resumed run does not train the start again, and ends the same"
    out, _ = small(home, 'whole')
    said = capsys.readouterr().out
    assert re.search(r'backbone reaches box AP [\d.]+, [\d.]+ points (above|below) the random start', said), said
    assert {'settings.json', 'scores.json', 'epochs.png', 'predictions.png', 'start', 'model'} <= {p.name for p in out.iterdir()}
    for arm in ('start', 'model'):
        have = {p.name for p in (out/arm).iterdir()}
        assert have >= {'scores.json', 'history.csv', 'model.safetensors', 'detections.json', 'predictions.png', 'curve.png'}
        assert 'checkpoints' not in have
    train, trained = run.train_row, []
    def stop(row, net, data, folder, label, *args, **kwargs):
        if label=='backbone' and len(trained)==1: raise KeyboardInterrupt
        trained.append(label)
        return train(row, net, data, folder, label, *args, **kwargs)
    monkeypatch.setattr(run, 'train_row', stop)
    with pytest.raises(KeyboardInterrupt): small(home, 'part')
    before = (home/'part/start/model.safetensors').stat().st_mtime_ns
    trained.append('stopped')
    run.transfer('scenes', resume=True, out=home/'part')
    assert (home/'part/start/model.safetensors').stat().st_mtime_ns==before
    assert values(home/'part')==values(out)

def test_the_table_shows_every_row_and_what_was_run(home):
    small(home, 'tabled', baseline=False)
    settings = json.loads((home/'tabled/settings.json').read_text())
    settings['arguments']['row'] = 'clove_coco_fpn'             # as if it had been that row
    (home/'tabled/settings.json').write_text(json.dumps(settings))
    table = run.rows_table([home/'tabled'])
    rows = [l for l in table.splitlines() if l.startswith('|')]
    assert len(rows)==2+len(POSTER_ROWS) and sum('not run' in l for l in rows)==len(POSTER_ROWS)-1
    own = next(l for l in rows if 'clove_coco_fpn' in l)
    assert 'box AP 41.2, mask AP 37.1' in own and own.count('box AP')==2
    assert f'settings={TINY}' in table and 'limit=8' in table and 'pycocotools' in table

def test_photographs_takes_one_label_a_pixel(home, capsys):
    out, scores = run.transfer('photographs', home/'backbone.safetensors', home/'labelled', out=home/'pixels', workers=0,
                               settings='epochs=1,channels=16,width=16')
    assert {s.probe for s in scores}>={'mIoU', 'aAcc', 'mAcc'} and 'photographs_semantic' in capsys.readouterr().out
    assert (out/'predictions.png').exists()

def test_frozen_starts_with_gathered_statistics(home):
    "A frozen random start knows the mean of the images, as it could without pretraining"
    row, data = find_row('scenes'), run.row_data(find_row('scenes'), limit=8)
    nets = run.start_and_backbone(row, home/'backbone.safetensors', home, 0, 'cpu', True, True, data)
    norms = [m for m in nets['random start'].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.running_mean.abs().sum()>0 for m in norms)

@pytest.mark.parametrize('words,said', [
    (dict(row='coco'), 'choose one of flsl_coco_s16'),
    (dict(row='scenes', data='coco'), 'leave out the data'),
    (dict(row='photographs', backbone='resnet18'), 'needs any folder with objects'),
    (dict(row='clove_coco_fpn', backbone='resnet50', data='nowhere'), 'is not a folder'),
    (dict(row='scenes', seed=-1), 'seed must be a whole number'),
    (dict(row='scenes', settings='epochs=many'), 'epochs must be like'),
    (dict(row='scenes', settings='drop=1'), "there is no setting 'drop'"),
    (dict(row='scenes', backbone='test_resnet', settings='layer_decay=.7,optimizer=lamb'), "'sgd', got 'lamb'"),
    (dict(row='scenes', settings='anchors=[8]', limit=8), 'give one side for each stride'),     # while its network is built
])
def test_wrong_words(home, monkeypatch, words, said):
    monkeypatch.chdir(home)
    before = sorted(home.rglob('*'))
    with pytest.raises(InputError, match=re.escape(said)): run.transfer(**words)
    assert sorted(home.rglob('*'))==before

def test_nothing_is_overwritten(home):
    out, _ = small(home, 'kept', baseline=False)
    before = (out/'scores.json').read_text()
    with pytest.raises(InputError, match='holds files already'): small(home, 'kept')
    with pytest.raises(InputError, match="limit was 8, now 4"): run.transfer('scenes', limit=4, resume=True, out=out)
    assert (out/'scores.json').read_text()==before
