"""The command line as a user meets it: one sentence for bad input and nothing written, a folder of results for good input."""
import csv
import inspect
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from densessl.ground.core import InputError
from densessl.methods.encoders import dense_encoder
from densessl.methods.export import export_backbone, load_backbone
from processes import Script, run_script

# what the console script of an installed package does
SCRIPT = 'import sys\nfrom densessl.ground.commands import densessl_pretrain\nsys.exit(densessl_pretrain())\n'

# the same for many command lines, as most of the time goes into imports
MANY = '''import contextlib, io, json, sys, traceback
from densessl.ground import commands
res = []
for name, *args in json.load(sys.stdin):
    sys.argv, code = [name, *args], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try: getattr(commands, name)()
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


ENV = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='', PYTHONWARNINGS='ignore::FutureWarning')   # torch on timm, at import


def run(home, script, args=(), **kwargs):
    (home/'script.py').write_text(script)
    return run_script('script.py', args, home, ENV, **kwargs)


def run_anew(home, script, args=()):
    "The same by a Python that has imported nothing"
    (home/'script.py').write_text(script)
    return subprocess.run([sys.executable, home/'script.py', *args], cwd=home, env=ENV, capture_output=True, text=True, timeout=300)


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
    'method':              (['photos', *TINY, '--method', 'simclr'], ['simclr', 'flsl']),
    'setting':             (['photos', *TINY, '--settings', 'beta=1'], ['beta', 'FLSLConfig']),
    'one cell':            (['photos', *tiny(arch='test_resnet', model_kwargs=''), '--method', 'clove'], ['test_resnet', '32', 'one cell']),
    'temperature':         (['photos', *TINY, '--settings', 'beta_sa=-1'], ['beta_sa', '-1']),
    'arguments for timm':  (['photos', *tiny(model_kwargs='patch_size')], ['patch_size', 'name=value']),
    'timm refuses':        (['photos', *tiny(model_kwargs='patch_sise=8')], ['patch_sise']),
    'no epochs':           (['photos', *tiny(epochs=-1)], ['epochs', '-1']),
    'no steps':            (['photos', *TINY, '--epoch-steps', '0'], ['epoch_steps', '0']),
    'too many steps':      (['photos', *TINY, '--epoch-steps', '5000'], ['epoch_steps', '5000', 'leave it out']),
    'labels':              (['photos', *TINY, '--labelled', 'notes'], ['notes']),
    'baseline':            (['photos', *TINY, '--baseline', 'resnet5'], ['resnet5', 'did you mean']),
    'workers':             (['photos', *tiny(workers=-1)], ['workers', '-1']),
    'device':              (['photos', *TINY, '--device', 'gpu'], ["'gpu'", 'cpu']),
    'no such GPU':         (['photos', *TINY, '--device', 'cuda:7'], ["'cuda:7'", 'cpu']),
    'seed':                (['photos', *TINY, '--seed', '-4'], ['seed', '-4']),
    'learning rate':       (['photos', *TINY, '--lr', '-0.5'], ['lr', '-0.5']),
    'no learning rate':    (['photos', *TINY, '--lr', 'nan'], ['lr', 'nan']),
    'odd size':            (['photos', *tiny(img_size=36)], ['patches of 8', '36']),
    'scores':              (['photos', *TINY, '--score-every', '-2'], ['score_every', '-2']),
    'minutes':             (['photos', *TINY, '--save-minutes', '0'], ['save_minutes', '0']),
    'share':               (['photos', *TINY, '--max-bad', '7'], ['max_bad', '7']),
    'kind of a setting':   (['photos', *TINY, '--settings', 'clip=much'], ['clip', 'much']),
    'colors':              (['photos', *TINY, '--settings', 'augment=2'], ['augment=none', '2']),
    'out inside a file':   (['photos', *TINY, '--out', 'notes/a.txt/run'], ['notes/a.txt', 'is a file']),
    'out cannot be made':  (['photos', *TINY, '--out', '/proc/densessl'], ['/proc/densessl', 'cannot be']),
    'two starts':          (['photos', *TINY, '--init', './x', '--pretrained'], ['--pretrained', '--init ./x']),
    'a file for a name':   (['photos', *tiny(arch='weights.pth')], ["'weights.pth' is a file", '--init weights.pth']),
    'weights of no name':  (['photos', *tiny(arch='vit_tiny_patch16_224.none')], ["'none'", 'vit_tiny_patch16_224']),
    'text for weights':    (['photos', *TINY, '--init', 'notes/a.txt'], ['notes/a.txt', 'it is text']),
    'size for timm':       (['photos', *tiny(model_kwargs='img_size=64')], ['leave img_size out of model_kwargs']),
    'weights for timm':    (['photos', *tiny(model_kwargs='pretrained=true')], ['leave pretrained out of model_kwargs: use --pretrained']),
    'out is the input':    (['photos', *TINY, '--out', 'photos/../photos', '--overwrite'], ['is the folder of the photographs']),
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
    r = run(home, MANY, input=json.dumps([['densessl_pretrain', *args] for args,_ in BAD.values()]))
    assert r.returncode==0, r.stderr
    return dict(zip(BAD, json.loads(r.stdout.splitlines()[-1]), strict=True)), before, tree(home)


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_sentence(refusals, case): check_refused(*refusals[0][case], BAD[case][1])


def test_bad_input_writes_nothing(home, refusals):
    assert refusals[1]==refusals[2]
    assert not (home/'runs').exists()


def test_bad_input_as_a_process(home):
    case, before = 'folder with files', tree(home)
    r = run_anew(home, SCRIPT, BAD[case][0])
    check_refused(r.returncode, r.stdout, r.stderr, BAD[case][1])
    assert tree(home)==before


RUNS = {                                         # method -> its flags, a column of its history, shape of its features
    'flsl':  ([], 'perplexity', (1,16,24)),
    'clove': (['--method', 'clove', '--arch', 'test_resnet', '--model_kwargs', 'output_stride=8', '--settings', 'local_size=16,n_local=2,hidden_dim=32,out_dim=16'], 'gap', (1,16,96)),
}

@pytest.mark.parametrize('method', RUNS)
def test_a_folder_of_photographs(home, method, monkeypatch):
    flags, column, shape = RUNS[method]
    flags = dict(zip(flags[::2], flags[1::2]))
    r = run(home, SCRIPT, ['photos', *(o for kv in (dict(zip(TINY[::2], TINY[1::2]))|flags).items() for o in kv), '--out', f'run_{method}'])
    assert r.returncode==0, r.stderr
    assert all(l.startswith('note: ') for l in r.stderr.splitlines()), r.stderr
    out = home/f'run_{method}'
    assert {p.name for p in out.iterdir()} == {'backbone.safetensors', 'start.safetensors', 'best.safetensors', 'best.txt', 'settings.json', 'history.csv', 'scores.json', 'scores_by_epoch.json',
                                                'picture.png', 'similarity.png', 'curves.png', 'report.html'}
    for f in out.iterdir(): assert f.name in r.stdout
    assert '24 photographs, 3 steps an epoch in batches of 8, 1 epoch: 3 steps' in r.stdout
    assert all(words in r.stdout for words in ('2 more kept apart', 'on cpu in float32', 'short: ', *['inverse temperatures ']*(method=='flsl'), 'few photographs: ', f'writing to run_{method}'))
    assert f"load_backbone('run_{method}/backbone.safetensors')" in r.stdout
    made = next(l for l in r.stdout.splitlines() if l.strip().startswith('timm.create_model'))
    monkeypatch.chdir(home)
    eval(made, dict(timm=timm))                  # the line loads the file, every weight of it
    assert 'could not be read' in r.stdout and '07.jpg' in r.stdout
    assert r.stdout.index('before training: ') < r.stdout.index('epoch 1 of 1: ') < r.stdout.index('epoch 1 of 1, scores: ') < r.stdout.index('| random start') < r.stdout.index(f'{method}, 1 epoch') < r.stdout.index('points against random start')

    s = json.loads((out/'settings.json').read_text())
    assert (s['folder'], s['method'], s['preset'], s['bs'], s['epochs']) == (str(home/'photos'), method, 'scenes', 8, 1)
    assert s['config']['img_size']==32
    scores = json.loads((out/'scores.json').read_text())
    assert len(scores)>=2
    with open(out/'history.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert rows[-1]['step']=='3' and all(np.isfinite(float(rows[0][k])) for k in (column, 'loss', 'rank'))
    for p in ('picture.png', 'similarity.png'):
        with Image.open(out/p) as im: assert min(im.size)>100

    z = load_backbone(out/'backbone.safetensors')(torch.zeros(1, 3, 32, 32))
    assert z.shape==shape and z.isfinite().all()


STOPPED = """import os, signal
from densessl.training.teacher import TeacherEMA
from densessl.cli import densessl_pretrain
update = TeacherEMA.after_step
def after_step(self):
    update(self)
    if self.train_iter==1: os.kill(os.getpid(), signal.SIGTERM)   # as a cluster does
TeacherEMA.after_step = after_step
densessl_pretrain()
"""

def test_stopped_and_resumed(home):
    r = run(home, STOPPED, ['photos', *TINY, '--out', 'stopped'])
    assert r.returncode==128+15 and 'SIGTERM' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert not (home/'stopped'/'backbone.safetensors').exists()
    resume = ['densessl_pretrain', '--resume', '--out', 'stopped']
    r = run(home, MANY, input=json.dumps([[*resume, '--lr', '0.5'], resume, [*resume, '--epochs', '20']]))
    other, resumed, complete = json.loads(r.stdout.splitlines()[-1])
    assert other[0]==1 and 'lr was None, now 0.5' in other[2], other
    assert resumed[0]==0 and 'resuming' in resumed[1] and (home/'stopped'/'backbone.safetensors').exists(), resumed
    assert complete[0]==1 and 'complete' in complete[2] and '--init stopped/backbone.safetensors' in complete[2], complete


def test_two_processes_stopped_and_resumed(home):
    def start(script, *args):
        "As `torchrun` starts them: what both print, and how each ended"
        (home/'script.py').write_text(script)
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        pair = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        with open(home/'said.txt', 'w+') as f:
            ps = [Script('script.py', args, home, ENV | pair | dict(RANK=r, LOCAL_RANK=r), stdout=f.fileno(), stderr=f.fileno()) for r in '01']
            codes = [p.wait() for p in ps]
            f.seek(0)
            return codes, f.read()
    codes, said = start(STOPPED, 'photos', *tiny(bs=4), '--out', 'pair')
    assert codes==[143, 143] and said.count('3 steps an epoch')==said.count('stopped; the state')==1, said
    assert not (home/'pair'/'backbone.safetensors').exists()
    codes, said = start(SCRIPT, '--resume', '--out', 'pair')
    assert codes==[0, 0] and said.count('written to pair')==1 and said.count('resuming')==1, said
    assert {p.name for p in (home/'pair').iterdir()} >= {'backbone.safetensors', 'best.safetensors', 'history.csv', 'scores.json', 'picture.png', 'settings.json'}


def test_a_run_on_scenes_is_resumed_with_its_own_network(tmp_path, monkeypatch):
    "The network of the drawn scenes was chosen, not given: a resume must find it again"
    from densessl import cli
    from densessl.training.resume import SaveRun
    monkeypatch.chdir(tmp_path)
    whole = SaveRun.after_batch
    def stop(self):
        whole(self)
        if self.learn.train_iter==2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(SaveRun, 'after_batch', stop)
        with pytest.raises(KeyboardInterrupt): cli.pretrain(method='clove', n_scenes=16, bs=8, epochs=2, out='run', score_every=0)
    _, scores, learn = cli.pretrain(out='run', resume=True)
    assert learn.model.backbone.model_kwargs['output_stride']==8 and scores and not (tmp_path/'run'/'checkpoints').exists()


# ---- options and mistakes, before torch is imported

COMMANDS = 'densessl_pretrain densessl_evaluate densessl_show densessl_shard densessl_transfer densessl_compare'.split()
LIGHT = """import sys
from densessl.ground import commands
f = getattr(commands, sys.argv.pop(1))
try: f()
finally: print('heavy:', *{'torch', 'fastai', 'timm', 'numpy'} & sys.modules.keys())
"""

@pytest.mark.parametrize('command', COMMANDS)
def test_help_is_light(tmp_path, command):
    r = run_anew(tmp_path, LIGHT, [command, '--help'])
    assert r.returncode==0 and r.stdout.rstrip().endswith('heavy:'), r.stdout + r.stderr
    assert f'usage: {command} ' in r.stdout and f'example:\n  {command} ' in r.stdout
    assert max(map(len, r.stdout.splitlines()))<=90


@pytest.mark.parametrize('args,words', [
    (['densessl_pretrain', 'photos', '--epoch', '3'], ['no option --epoch', 'mean --epochs?']),
    (['densessl_pretrain', 'photos', '--scoer-every', '3'], ['no option --scoer-every', 'mean --score-every?']),
    (['densessl_pretrain', 'photos', '--model_kwarg=depth=3'], ['no option --model_kwarg:', 'mean --model_kwargs?']),
    (['densessl_pretrain', 'photos', '--bs', 'many'], ["--bs needs a whole number, got 'many'"]),
    (['densessl_pretrain', 'photos', '--save-minutes', 'ten'], ["--save_minutes needs a number, got 'ten'"]),
    (['densessl_pretrain', 'photos', 'more'], ["'more' is one argument too many"]),
    (['densessl_evaluate', 'backbone.safetensors'], ['data']),
    (['densessl_evaluate', 'a', 'b', '--limits', '3'], ['mean --limit?']),
    (['densessl_show', 'a', 'b', '--layer', 'last'], ["--layer needs a whole number, got 'last'"]),
    (['densessl_shard', 'a', 'b', '--per-shard', '1e3'], ["--per_shard needs a whole number, got '1e3'"]),
    (['densessl_transfer', 'scenes', '--limits', '3'], ['mean --limit?']),
    (['densessl_transfer', 'scenes', '--epochs', '3'], ['no option --epochs; a setting is given as --settings epochs=3 (see']),
    (['densessl_transfer', 'scenes', '--layer-decay=.7'], ['--settings layer_decay=.7']),
    (['densessl_compare', 'photos', '--minuts', '3'], ['mean --minutes?']),
])
def test_a_mistake_is_answered_at_once(tmp_path, args, words):
    r = run_anew(tmp_path, LIGHT, args)
    assert r.returncode==2 and r.stdout.strip()=='heavy:' and r.stderr.count('\n')==1, r.stdout + r.stderr
    for w in words: assert w in r.stderr, r.stderr


@pytest.mark.parametrize('command', COMMANDS)
def test_every_option_has_both_spellings(command):
    from densessl.ground import commands
    from fastcore.script import anno_parser
    func = getattr(commands, command).__wrapped__
    names = [k for k,p in inspect.signature(func).parameters.items() if p.default is not inspect.Parameter.empty and k not in ('folder', 'photos', 'places')]
    needed = [k for k,p in inspect.signature(func).parameters.items() if p.default is inspect.Parameter.empty]
    parsers = [anno_parser(func), commands.command_parser(func, '', '')]     # fastcore's, and ours
    for parser in parsers:
        for name in names:
            flags = {f'--{name}', f'--{name.replace("_", "-")}'}
            bare = inspect.signature(func).parameters[name].default is False or name=='bf16' or (command, name)==('densessl_transfer', 'baseline')
            given = [getattr(parser.parse_args([*needed, f] + ([] if bare else ['3'])), name) for f in flags]
            assert all(v in (True, 3, 3., '3') for v in given), (name, given)


def test_commands_and_functions_have_the_same_defaults():
    from densessl.ground import commands
    from densessl.cli import pretrain
    from densessl.show import show_backbone
    from densessl.evaluation.report import evaluate
    from densessl.data.shards import write_shards
    for command,f in zip(COMMANDS, (pretrain, evaluate, show_backbone, write_shards)):
        own, theirs = ({k: p.default for k,p in inspect.signature(g).parameters.items()} for g in (getattr(commands, command).__wrapped__, f))
        assert own=={k: theirs[k] for k in own}, command
    from densessl.transfer.run import transfer
    own, theirs = ({k: p.default for k,p in inspect.signature(g).parameters.items() if k!='places'} for g in (commands.densessl_transfer.__wrapped__, transfer))
    assert own=={k: theirs[k] for k in own}


# ---- while a command works

def test_other_commands_refuse_in_a_sentence(home):
    from densessl.methods.encoders import dense_encoder
    from densessl.methods.export import export_backbone
    (home/'taken.json').write_text('my notes')
    export_backbone(dense_encoder('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3), home/'tiny.safetensors')
    cases = {                                # command line -> words of its one line
        'evaluate tiny.safetensors photos --device gpu': ["'gpu'", 'cpu'],
        'evaluate tiny.safetensors photos --size 0': ['size', '0'],
        'evaluate tiny.safetensors photos --limit -3': ['limit', '-3'],
        'evaluate tiny.safetensors photos --out taken.json': ['taken.json', 'no results file'],
        'evaluate tiny.safetensors photos --out notes/a.txt/x.json': ['notes/a.txt', 'is a file'],
        'evaluate tiny.safetensors photos --out /proc/x.json': ['/proc/x.json', 'cannot be written'],
        'evaluate none.safetensors photos': ['none.safetensors'],
        'show tiny.safetensors photos --size -1': ['size', '-1'],
        'show tiny.safetensors photos --out /proc/x.html': ['/proc/x.html', 'cannot be written'],
        'shard photos /proc/x': ['/proc/x', 'cannot be written'],
        'shard photos new --workers -2': ['workers', '-2'],
        'shard photos notes/a.txt/x': ['notes/a.txt', 'is a file'],
    }
    before = tree(home)
    r = run(home, MANY, input=json.dumps([('densessl_' + line).split() for line in cases]))
    assert r.returncode==0, r.stderr
    for (line, words), (code, _, err) in zip(cases.items(), json.loads(r.stdout.splitlines()[-1]), strict=True):
        assert code==1 and err.count('\n')==1 and err.startswith(f'densessl_{line.split()[0]}: '), (line, err)
        for w in words: assert w in err, (line, err)
    assert tree(home)==before


@pytest.mark.parametrize('error,code', [
    (InputError('leave it out, or set n_local=0 and overwrite=True'), 'densessl_pretrain: leave it out, or set --settings n_local=0 and --overwrite'),
    (PermissionError(13, 'Permission denied', '/data/x.jpg'), "densessl_pretrain: '/data/x.jpg': permission denied"),
    (OSError(28, 'No space left on device'), 'densessl_pretrain: no space left on device'),
    (KeyboardInterrupt(), 130),
    (ZeroDivisionError(), None),                 # a fault of ours keeps its traceback
])
def test_errors_while_it_works(error, code, monkeypatch, capsys):
    from densessl import cli
    from densessl.ground import commands
    def pretrain(**args): raise error
    monkeypatch.setattr(cli, 'pretrain', pretrain)
    monkeypatch.setattr(sys, 'argv', ['densessl_pretrain'])
    with pytest.raises(SystemExit if code else ZeroDivisionError) as e: commands.densessl_pretrain()
    if code: assert e.value.code==code
    assert capsys.readouterr().err==('densessl_pretrain: stopped\n' if code==130 else '')


def test_output_that_cannot_be_printed(tmp_path):
    "A character that the terminal does not know is escaped, and a reader that has gone ends a command without a word"
    r = run(tmp_path, """import os, sys
from densessl import cli
from densessl.ground import commands
sys.stdout = open(1, 'w', encoding='ascii')
def pretrain(**args):
    print('21.8 \u00b1 1.4', flush=True)
    raise BrokenPipeError(32, 'Broken pipe')
cli.pretrain, sys.argv = pretrain, ['densessl_pretrain']
commands.densessl_pretrain()
""")
    assert (r.returncode, r.stdout, r.stderr)==(1, '21.8 \\xb1 1.4\n', '')


# ---- what was not given

def decided(home, **args):
    "The arguments after the first stage, which reads nothing"
    from densessl.job import Arguments, resolve
    return resolve(Arguments(**dict(folder=str(home/'photos')) | args))


def test_the_method_suits_the_network(home):
    assert decided(home).method=='flsl' and decided(home).arch=='vit_small_patch16_224'
    assert decided(home, method='clove').arch=='resnet50'
    for arch, method in dict(resnet18='clove', convnext_atto='clove', vit_tiny_patch16_224='flsl', deit3_small_patch16_224='flsl').items():
        job = decided(home, arch=arch)
        assert job.method==method and any(arch in note for note in job.notes)
    assert decided(home, arch='resnet18', method='dino').method=='dino'


def test_local_views_go_with_the_size(home):
    def local(**args): return decided(home, **args).config.local_size
    assert local()==96 and local(img_size=448)==192 and local(img_size=64, model_kwargs='patch_size=8')==24
    assert local(arch='vit_small_patch14_dinov2')==98
    assert local(img_size=448, settings='local_size=32')==32
    assert local(arch='resnet18', img_size=128)==64


def test_the_start_is_handed_to_the_learner(home, monkeypatch):
    from densessl import cli, job
    assert decided(home, pretrained=True, arch='resnet18').init=='resnet18'
    got = {}
    def learner(dls, arch, method, config, **kwargs):
        got.update(kwargs)
        raise InterruptedError
    monkeypatch.setattr(job, 'learner', learner)
    with pytest.raises(InterruptedError): cli.pretrain(str(home/'photos'), img_size=32, arch='vit_tiny_patch16_224', model_kwargs='patch_size=8', init='test_vit', workers=0, compile=True, out=home/'never')
    assert got['init']=='test_vit' and got['bf16'] is False and got['compile'] is True and not (home/'never').exists()


def test_every_seed_is_scored_on_the_same_photographs(home):
    "Seeds differ in order and weights, not in what is kept apart"
    from densessl import job as stages
    small = dict(img_size=32, arch='vit_tiny_patch16_224', model_kwargs='patch_size=8,embed_dim=24,depth=1,num_heads=3', workers=0, epochs=1)
    a, b = (stages.open_run(decided(home, seed=s, **small)).learn.dls for s in (0, 1))
    assert len(a.valid_ds) and a.valid_ds.paths==b.valid_ds.paths and a.train_ds.paths==b.train_ds.paths
    assert list(a.train.get_idxs())!=list(b.train.get_idxs())

def test_weights_bring_their_normalization(home, tmp_path):
    "And published ones with batch norm are scored twice, in two rows"
    from densessl import cli, job as stages
    from densessl.evaluation.scores import read_scores
    encoder = dense_encoder('test_resnet', img_size=32, output_stride=8)
    export_backbone(encoder, tmp_path/'b.safetensors', mean=(.5, .4, .3), std=(.2, .2, .2))
    args = dict(init=str(tmp_path/'b.safetensors'), method='byol', preset='scenes', img_size=32, workers=0, epochs=1, score_every=0)
    recipe = stages.open_run(decided(home, **args)).learn.dls.recipe
    assert (recipe.mean, recipe.std)==((.5, .4, .3), (.2, .2, .2))
    cli.pretrain(str(home/'photos'), out=tmp_path/'run', **args)
    rows = {s.model for s in read_scores(tmp_path/'run/scores.json')}
    assert {'published weights', 'published weights, gathered statistics'} <= rows

def test_a_small_folder_gets_a_small_batch_and_more_epochs(home):
    from densessl import job as stages
    job = decided(home, img_size=32, arch='vit_tiny_patch16_224', model_kwargs='patch_size=8,embed_dim=24,depth=1,num_heads=3', workers=0)
    run = stages.open_run(job)
    assert (job.bs, job.steps, job.epochs)==(8, 3, 167) and job.steps*job.epochs>=stages.ENOUGH_STEPS
    said = '\n'.join(stages.opening(run))
    assert 'short' not in said and '24 photographs, 3 steps an epoch in batches of 8, 167 epochs: 501 steps' in said


@pytest.mark.parametrize('method', ['flsl', 'clove', 'dino'])
def test_the_step_that_is_tried_changes_nothing(method):
    "Weights, statistics, order of the photographs and random states after an epoch are those of a run without it"
    from densessl import job
    from densessl.data.images import scene_dls
    torch.set_num_threads(1)
    m = job.methods[method]
    config = job.change_settings(m.presets['scenes'], dict(img_size=32, local_size=16))
    def trained(tried):
        job.set_seed(0)
        learn = job.learner(scene_dls(16, m.recipe(config), bs=4, seed=0), m.scene_arch, m, config, model_kwargs=job.parse_kwargs(m.scene_kwargs))
        if tried: assert job.try_step(learn)[0]>0 and learn.loss_func.parts is None
        learn.fit(1)
        return learn.model.state_dict() | dict(next=torch.rand(3))
    tried, plain = trained(True), trained(False)
    assert all(torch.equal(tried[k], v) for k,v in plain.items())


def test_a_step_that_does_not_fit_is_told_before_the_run(home, monkeypatch):
    from densessl.job import expected, open_run
    run = open_run(decided(home, img_size=32, arch='vit_tiny_patch16_224', model_kwargs='patch_size=8,embed_dim=24,depth=1,num_heads=3', workers=0))
    def forward(self, views): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(type(run.learn.model), 'forward', forward)
    with pytest.raises(InputError, match='out of memory: pass bf16=True, lower bs'): expected(run)


def test_the_step_that_is_tried_is_a_whole_one(monkeypatch):
    "Optimizer and teacher are in it; on a CPU, processes that read take their share of the cores; validation is counted"
    from densessl import job
    from densessl.training import trial
    from densessl.data.images import scene_dls
    m = job.methods['flsl']
    config = job.change_settings(m.presets['scenes'], dict(img_size=32, local_size=16))
    learn = job.learner(scene_dls(16, m.recipe(config), bs=4, seed=0), m.scene_arch, m, config, model_kwargs=job.parse_kwargs(m.scene_kwargs))
    now, dl, opt_func = [0.], learn.dls.train, learn.opt_func
    monkeypatch.setattr(trial.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(trial, 'num_cpus', lambda: 2)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    def takes(seconds, f):
        def _f(*args, **kwargs): now[0] += seconds; return f(*args, **kwargs)
        return _f
    def slow_optimizer(*args, **kwargs):
        opt = opt_func(*args, **kwargs)
        opt.step = takes(3, opt.step)
        return opt
    learn.opt_func = slow_optimizer
    monkeypatch.setattr(type(learn.model), 'update_teacher', takes(4, type(learn.model).update_teacher))
    monkeypatch.setattr(trial, 'read_batch', lambda dl: (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.full((4, 2), 32), 5.))
    whole = 7/job.KEPT
    assert trial.try_step(learn, pace=job.KEPT)[0]==pytest.approx(whole+5)                       # one process does both
    dl.fake_l.num_workers = 1
    assert trial.try_step(learn, pace=job.KEPT)[0]==pytest.approx(whole+5/2)                     # a second of reading takes half a one from the step
    monkeypatch.setattr(trial, 'num_cpus', lambda: 16)
    assert trial.try_step(learn, pace=job.KEPT)[0]==pytest.approx(whole)
    run = job.Run(SimpleNamespace(bf16=False, steps=4, epochs=100), learn, None, None)
    monkeypatch.setattr(job, 'try_step', lambda *args: (60., 'much'))
    assert job.expected(run)=='expected: about 7 hours and the scoring, 60 s a step; much of memory'
    learn.dls.loaders[1] = [None]*3                                             # three batches kept apart: a step's worth an epoch
    assert '8 hours' in job.expected(run) and 'for the rest: about 4 hours' in job.expected(run, 200)


def test_a_short_run_keeps_the_teacher_sharp(home, monkeypatch, capsys):
    "On photographs, unless the settings say otherwise: a temperature that rises before anything is learned makes all targets uniform"
    from densessl import cli
    class Begun(Exception): pass
    def stop(*args): raise Begun
    monkeypatch.setattr(cli, 'expected', stop)
    small = dict(img_size=32, arch='vit_tiny_patch16_224', model_kwargs='patch_size=8,embed_dim=24,depth=1,num_heads=3', workers=0, epochs=3)
    def said(**args):
        with pytest.raises(Begun): cli.pretrain(str(home/'photos'), out=home/'never', **small|args)
        return next((l for l in capsys.readouterr().out.splitlines() if 'teacher temperature' in l), None)
    assert said()==said(method='dino')=='teacher temperature 0.04 to 0.04'
    assert said(settings='temp_t=[0.03,0.06]')=='teacher temperature 0.03 to 0.06'
    assert said(preset='official').endswith('0.04 to 0.07')
    assert said(method='clove', arch='test_resnet', model_kwargs='output_stride=8', settings='n_local=0') is None


def test_the_cost_on_a_card_is_said_for_photographs(home, monkeypatch, capsys):
    "One line, once the step was tried; none on drawn scenes, for a network that cannot be counted, or on a card that is not known"
    from densessl import cli, job
    class Begun(Exception): pass
    def stop(*args): raise Begun
    monkeypatch.setattr(cli, 'run_folder', lambda *args, **kwargs: home/'never' if 'make' in kwargs else stop())
    small = dict(img_size=32, arch='vit_tiny_patch16_224', model_kwargs='patch_size=8,embed_dim=24,depth=1,num_heads=3', workers=0, epochs=3)
    def said(**args):
        with pytest.raises(Begun): cli.pretrain(**small | args)
        return [l for l in capsys.readouterr().out.splitlines() if l.startswith('on one')]
    line, = said(folder=str(home/'photos'))
    c = job.cost('flsl', 'vit_tiny_patch16_224', batch=8, model_kwargs=job.parse_kwargs(small['model_kwargs']),
                 config=replace(decided(home, **small).config, n_prototypes=4))     # 48 queries a step
    assert line.startswith('on one H100, by the roofline: about 0 seconds and the scoring, ') and line.endswith(' of 79 GiB')
    assert f'{c.images_per_second:,.0f} photographs a second' in line
    assert said(n_scenes=32)==[]
    monkeypatch.setattr(job, 'cost', stop)
    assert said(folder=str(home/'photos'))==[]
    names = {'NVIDIA H100 80GB HBM3': 'H100', 'NVIDIA A100-SXM4-80GB': 'A100', 'NVIDIA L4': 'L4', 'NVIDIA L40S': None,
             'NVIDIA GeForce RTX 4090': 'RTX4090', 'NVIDIA GeForce RTX 4080': None, 'NVIDIA H200': 'H200'}
    for name, card in names.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
        assert job.card_to_ask(torch.device('cuda:0'))==card
    assert job.card_to_ask(torch.device('cpu'))=='H100'


def test_slow_reading_is_in_the_time_that_is_expected(monkeypatch):
    "A photograph takes two seconds by the clock of the test: six for a batch of three, two with as many processes"
    from densessl.training import trial
    now = [0.]
    class Slow(list):
        def __getitem__(self, i): now[0] += 2; return super().__getitem__(i)
    monkeypatch.setattr(trial.time, 'perf_counter', lambda: now[0])
    ds = Slow([(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([8, 8]), '')]*2)
    dl = SimpleNamespace(dataset=ds, bs=3, fake_l=SimpleNamespace(num_workers=0))
    canvas, hw, seconds = trial.read_batch(dl)
    assert (canvas.shape, hw.shape, seconds)==((3, 3, 8, 8), (3, 2), 6)
    dl.fake_l.num_workers = 3
    assert trial.read_batch(dl)[2]==2


def test_weights_bring_their_network(home, tmp_path):
    "`--init FILE` without `--arch`: the network of the file, its arguments written down for a resume"
    net = timm.create_model('vit_tiny_patch16_224', num_classes=0)
    torch.save(dict(teacher={f'backbone.{k}': v for k,v in net.state_dict().items()}), tmp_path/'dino.pth')
    job = decided(home, init=str(tmp_path/'dino.pth'))
    assert (job.method, job.arch)==('flsl', 'vit_tiny_patch16_224') and any('the network of' in n for n in job.notes)
    assert decided(home, init=str(tmp_path/'dino.pth'), arch='vit_small_patch16_224').arch=='vit_small_patch16_224'
    from densessl.methods.encoders import dense_encoder
    from densessl.methods.export import export_backbone
    export_backbone(dense_encoder('test_resnet', img_size=32, output_stride=8, channels=(16,16,16,24)), tmp_path/'cnn.safetensors')
    job = decided(home, init=str(tmp_path/'cnn.safetensors'))
    assert (job.method, job.arch, job.kwargs['output_stride'], tuple(job.kwargs['channels']))==('clove', 'test_resnet', 8, (16,16,16,24))
    again = decided(home, init=str(tmp_path/'cnn.safetensors'), arch=job.arch, model_kwargs=job.model_kwargs)
    assert again.kwargs==job.kwargs


def test_files_of_two_runs_have_two_names():
    from densessl.evaluation.report import _with_folders
    assert _with_folders(['a/backbone.safetensors', 'resnet50', 'tiny.safetensors'], ['backbone', 'resnet50', 'tiny'])==['a/backbone', 'resnet50', 'tiny']
    assert _with_folders(['b/backbone.safetensors'], ['backbone'])==['b/backbone']
