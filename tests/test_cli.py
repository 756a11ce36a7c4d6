"""The command line as a user meets it: one sentence for bad input and nothing written, a folder of results for good input."""
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

# what the console script of an installed package does
SCRIPT = 'import sys\nfrom densessl.cli import densessl_pretrain\nsys.exit(densessl_pretrain())\n'

# the same for many command lines, as most of the time goes into imports
MANY = '''import contextlib, io, json, sys, traceback
from densessl.cli import densessl_pretrain
res = []
for args in json.load(sys.stdin):
    sys.argv, code = ['densessl_pretrain', *args], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try: densessl_pretrain()
        except SystemExit as e:
            code = 1 if isinstance(e.code, str) else e.code
            if isinstance(e.code, str): print(e.code, file=sys.stderr)
        except BaseException: code = 1; traceback.print_exc()
    res.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(res))
'''
TINY = '--arch vit_tiny_patch16_224 --preset scenes --img_size 32 --model_kwargs patch_size=8,embed_dim=24,depth=1,num_heads=3 --bs 8 --epochs 1 --workers 0'.split()


def tiny(**change):
    "The small settings with some flags changed"
    flags = dict(zip(TINY[::2], TINY[1::2])) | {f'--{k}': str(v) for k,v in change.items()}
    return [o for kv in flags.items() for o in kv]


def run(home, script, args=(), **kwargs):
    (home/'script.py').write_text(script)
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='', PYTHONWARNINGS='ignore::FutureWarning')   # torch on timm, at import
    return subprocess.run([sys.executable, home/'script.py', *args], cwd=home, env=env, capture_output=True, text=True, timeout=300, **kwargs)


def tree(home): return {str(p.relative_to(home)): p.stat().st_mtime_ns for p in home.rglob('*') if p.is_file() and p.name!='script.py'}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with folders of photographs, good and bad"
    home = tmp_path_factory.mktemp('cli')
    for d in ('photos/deeper', 'empty', 'notes', 'garbage', 'full'): (home/d).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(26):          # two are kept apart, the others make three batches: every file is read
        im = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((48+i, 40), Image.Resampling.BICUBIC)
        im.save(home/'photos'/('deeper' if i%2 else '')/f'{i:02}.jpg')
    bad = home/'photos'/'deeper'/'07.jpg'
    bad.write_bytes(bad.read_bytes()[:150] + b'not a jpeg any more')
    for i in range(12): (home/'garbage'/f'{i}.jpg').write_bytes(b'not a photograph')
    (home/'notes'/'a.txt').write_text('no photograph')
    (home/'full'/'precious.txt').write_text('keep me')
    return home


BAD = {                                          # name -> command line, words its one line must hold
    'no folder':           (['nowhere', *TINY], ['nowhere', 'does not exist']),
    'a file':              (['notes/a.txt', *TINY], ['notes/a.txt', 'not a folder']),
    'empty folder':        (['empty', *TINY], ['empty']),
    'no images':           (['notes', *TINY], ['notes', 'no image']),
    'none can be read':    (['garbage', *TINY], ['garbage', 'can be read']),
    'unknown network':     (['photos', *tiny(arch='vit_tinny_patch16_224')], ['vit_tinny_patch16_224', 'did you mean', 'vit_tiny_patch16_224']),
    'patch':               (['photos', *tiny(img_size=44)], ['patches of 8', '44']),
    'prototypes':          (['photos', *TINY, '--settings', 'n_prototypes=5000'], ['n_prototypes', '5000']),
    'batch of one':        (['photos', *tiny(bs=1)], ['bs', '1']),
    'batch too large':     (['photos', *tiny(bs=100)], ['100', 'images']),
    'folder with files':   (['photos', *TINY, '--out', 'full'], ['full', '--overwrite']),
    'out is a file':       (['photos', *TINY, '--out', 'notes/a.txt'], ['notes/a.txt', 'folder']),
    'preset':              (['photos', *tiny(preset='papr')], ['papr', 'paper']),
    'method':              (['photos', *TINY, '--method', 'byol'], ['byol', 'flsl']),
    'setting':             (['photos', *TINY, '--settings', 'beta=1'], ['beta', 'FLSLConfig']),
    'one cell':            (['photos', *tiny(arch='test_resnet', model_kwargs=''), '--method', 'clove'], ['test_resnet', '32', 'one cell']),
    'temperature':         (['photos', *TINY, '--settings', 'beta_sa=-1'], ['beta_sa', '-1']),
    'arguments for timm':  (['photos', *tiny(model_kwargs='patch_size')], ['patch_size', 'name=value']),
    'timm refuses':        (['photos', *tiny(model_kwargs='patch_sise=8')], ['patch_sise']),
    'no epochs':           (['photos', *tiny(epochs=-1)], ['epochs', '-1']),
    'labels':              (['photos', *TINY, '--labelled', 'notes'], ['notes']),
    'baseline':            (['photos', *TINY, '--baseline', 'resnet5'], ['resnet5', 'did you mean']),
    'resume nothing':      (['photos', *TINY, '--resume'], ['--out']),
    'resume a stranger':   (['photos', *TINY, '--resume', '--out', 'full'], ['full', 'settings.json']),
}


def check_refused(code, out, err, words):
    assert code==1
    lines = err.strip().split('\n')
    assert len(lines)==1 and lines[0].startswith('densessl_pretrain: '), err
    for w in words: assert w in lines[0], err


@pytest.fixture(scope='module')
def refusals(home):
    before = tree(home)
    r = run(home, MANY, input=json.dumps([args for args,_ in BAD.values()]))
    assert r.returncode==0, r.stderr
    return dict(zip(BAD, json.loads(r.stdout.splitlines()[-1]), strict=True)), before, tree(home)


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_sentence(refusals, case): check_refused(*refusals[0][case], BAD[case][1])


def test_bad_input_writes_nothing(home, refusals):
    assert refusals[1]==refusals[2]
    assert not (home/'runs').exists()


@pytest.mark.parametrize('case', ['no folder', 'folder with files'])
def test_bad_input_as_a_process(home, case):
    before = tree(home)
    r = run(home, SCRIPT, BAD[case][0])
    check_refused(r.returncode, r.stdout, r.stderr, BAD[case][1])
    assert tree(home)==before


RUNS = {                                         # method -> its flags, a column of its history, shape of its features
    'flsl':  ([], 'perplexity', (1,16,24)),
    'clove': (['--method', 'clove', '--arch', 'test_resnet', '--model_kwargs', 'output_stride=8', '--settings', 'local_size=16,n_local=2,hidden_dim=32,out_dim=16'], 'gap', (1,96,4,4)),
}

@pytest.mark.parametrize('method', RUNS)
def test_a_folder_of_photographs(home, method):
    flags, column, shape = RUNS[method]
    flags = dict(zip(flags[::2], flags[1::2]))
    r = run(home, SCRIPT, ['photos', *(o for kv in (dict(zip(TINY[::2], TINY[1::2]))|flags).items() for o in kv), '--out', f'run_{method}'])
    assert r.returncode==0, r.stderr
    assert all(l.startswith('note: ') for l in r.stderr.splitlines()), r.stderr
    out = home/f'run_{method}'
    assert {p.name for p in out.iterdir()} == {'backbone.safetensors', 'start.safetensors', 'best.safetensors', 'best.txt', 'settings.json', 'history.csv', 'scores.json', 'scores_by_epoch.json',
                                                'picture.png', 'similarity.png', 'curves.png'}
    for f in out.iterdir(): assert f.name in r.stdout
    assert '24 photographs, 3 steps' in r.stdout
    assert 'could not be read' in r.stdout and '07.jpg' in r.stdout
    assert r.stdout.index('before training: ') < r.stdout.index('epoch 1: ') < r.stdout.index('| random start') < r.stdout.index(f'{method}, 1 epoch') < r.stdout.index('points against random start')

    s = json.loads((out/'settings.json').read_text())
    assert (s['folder'], s['method'], s['preset'], s['bs'], s['epochs']) == ('photos', method, 'scenes', 8, 1)
    assert s['config']['img_size']==32
    scores = json.loads((out/'scores.json').read_text())
    assert len(scores)>=2
    with open(out/'history.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert rows[-1]['step']=='3' and all(np.isfinite(float(rows[0][k])) for k in (column, 'loss', 'rank'))
    for p in ('picture.png', 'similarity.png'):
        with Image.open(out/p) as im: assert min(im.size)>100

    with safe_open(out/'backbone.safetensors', 'pt') as f:
        meta, state = json.loads(f.metadata()['densessl']), {k: f.get_tensor(k) for k in f.keys()}
    net = timm.create_model(meta['arch'], **meta['model_kwargs'])
    state.pop('cls_token', None)           # of zeros, for timm's plain name
    if 'pos_embed' in state: state['pos_embed'] = state['pos_embed'][:, -net.pos_embed.shape[1]:]
    net.load_state_dict(state)
    z = net.eval().forward_features(torch.zeros(1, 3, 32, 32))
    assert z.shape==shape and z.isfinite().all()


STOPPED = """import os, signal
from densessl.callback.teacher import TeacherEMA
from densessl.cli import densessl_pretrain
update = TeacherEMA.after_step
def after_step(self):
    update(self)
    if self.train_iter==1: os.kill(os.getpid(), signal.SIGTERM)   # as a cluster does
TeacherEMA.after_step = after_step
densessl_pretrain()
"""

def test_stopped_and_gone_on_with(home):
    straight = run(home, SCRIPT, ['photos', *TINY, '--out', 'straight'])
    assert straight.returncode==0, straight.stderr
    r = run(home, STOPPED, ['photos', *TINY, '--out', 'stopped'])
    assert r.returncode==128+15 and 'SIGTERM' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert not (home/'stopped'/'backbone.safetensors').exists()
    r = run(home, SCRIPT, ['--resume', '--out', 'stopped', '--lr', '0.5'])
    assert r.returncode==1 and 'lr was None, now 0.5' in r.stderr, r.stderr
    r = run(home, SCRIPT, ['--resume', '--out', 'stopped'])
    assert r.returncode==0 and 'going on with' in r.stdout, r.stderr
    for name in ('backbone.safetensors', 'best.safetensors', 'history.csv', 'scores.json', 'scores_by_epoch.json'):
        assert (home/'stopped'/name).read_bytes()==(home/'straight'/name).read_bytes(), name
    r = run(home, SCRIPT, ['--resume', '--out', 'stopped'])
    assert r.returncode==1 and 'complete' in r.stderr


def test_two_processes_stopped_and_gone_on_with(home):
    def start(script, *args):
        (home/'script.py').write_text(script)
        env = {k: v for k,v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')} | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='', PYTHONWARNINGS='ignore')
        launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
        return subprocess.run([*launch, 'script.py', *args], cwd=home, env=env, capture_output=True, text=True, timeout=300)
    r = start(STOPPED, 'photos', *tiny(bs=4), '--out', 'pair')
    assert r.returncode and '3 steps an epoch' in r.stdout and 'stopped; the state' in r.stdout, r.stdout+r.stderr
    assert not (home/'pair'/'backbone.safetensors').exists()
    r = start(SCRIPT, '--resume', '--out', 'pair')
    assert r.returncode==0 and r.stdout.count('written to pair')==1 and r.stdout.count('going on with')==1, r.stdout+r.stderr
    assert {p.name for p in (home/'pair').iterdir()} >= {'backbone.safetensors', 'best.safetensors', 'history.csv', 'scores.json', 'picture.png', 'settings.json'}
