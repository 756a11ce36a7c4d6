"""README's Python and commands as they are printed, on small data: `python readme_as_printed.py README.md FOLDER [small]`.

A plain script, so that it runs in an environment without pytest. FOLDER is empty; photographs are drawn into it. What is replaced, because a laptop has no
hours to spare, stands in `PYTHON` and `COMMANDS`, with `small` (images of 64 px) in `SMALLER` too; everything else is the text of README. The last line printed is JSON: what each step said."""
import ast, contextlib, importlib, io, json, os, pkgutil, re, runpy, shlex, signal, subprocess, sys, traceback
from pathlib import Path

PYTHON = {'fit(100': 'fit(2', 'bs=64': 'bs=4', 'vit_small_patch16_224': 'vit_tiny_patch16_224'}   # text -> text in its place
SMALLER = {'flsl_recipe()': "flsl_recipe(flsl_presets['scenes'])", "'vit_tiny_patch16_224')": "'vit_tiny_patch16_224', 'scenes', model_kwargs=dict(patch_size=8))"}
SMALL = ('--arch vit_tiny_patch16_224 --preset scenes --img_size 32 --model_kwargs patch_size=8,embed_dim=24,depth=1,num_heads=3 '
         '--epochs 3 --bs 4 --workers 0 --labelled labelled/')
COMMANDS = {'densessl_pretrain photos/': SMALL, 'densessl_transfer': '--settings epochs=1,channels=16,width=16 --workers 0',
            'densessl_compare': '--arch test_resnet --model_kwargs output_stride=8 --img_size 32 --bs 4 --workers 0 --minutes .001 --seeds 1'}   # beginning of a command -> options added to it
DOWNLOADS = {'--others resnet50': '--others runs/photos/start.safetensors'}   # published weights -> a file that is there

def draw_folders():
    "photos/ with 16 photographs, labelled/ with 8 and their masks, in the usual layout"
    import numpy as np
    from PIL import Image
    from densessl.ground.synthetic import CLASSES, draw_scenes
    x, masks = draw_scenes(24, 64, seed=0, natural=True)
    x = x.permute(0, 2, 3, 1).numpy()
    for d in ('photos', *(f'labelled/{k}/{p}' for k in ('images', 'masks') for p in ('train', 'val'))): Path(d).mkdir(parents=True)
    for i in range(16): Image.fromarray(x[i]).resize((96, 80)).save(f'photos/{i+1}.jpg')
    for i in range(16, 24):
        part = 'train' if i%2 else 'val'
        Image.fromarray(x[i]).save(f'labelled/images/{part}/{i}.jpg', quality=95)
        Image.fromarray(masks[i].numpy().astype(np.uint8)).save(f'labelled/masks/{part}/{i}.png')
    Path('labelled/classes.txt').write_text('\n'.join(CLASSES) + '\n')

def fenced(readme, *languages):
    "Blocks of code of README"
    return re.findall(rf'^```(?:{"|".join(languages)})\n(.*?)^```', readme, flags=re.M|re.S)

def replaced(text, table):
    "Each text of the table must be there, or the substitution has gone stale"
    for old,new in table.items():
        assert old in text, f'README no longer says {old!r}'
        text = text.replace(old, new)
    return text

def run_python(readme, table):
    "All Python blocks in one namespace, statement by statement: source -> what it shows"
    names, shown = {'__name__': 'readme'}, {}
    for block in fenced(readme, 'python'):
        if 'from densessl.all import *' in block: block = replaced(block, table)
        for statement in ast.parse(block).body:
            source = ast.get_source_segment(block, statement)
            if isinstance(statement, ast.Expr): shown[source] = repr(eval(source, names))
            else: exec(source, names)
    return shown, names

def commands(readme):
    "The densessl commands of README's shell blocks, comments taken away"
    lines = [shlex.join(shlex.split(l, comments=True)) for b in fenced(readme, 'sh', 'bash') for l in b.splitlines()]
    return [l for l in lines if l.startswith('densessl_')]

def reduced(command):
    "A command with what a small machine needs"
    for begin,options in COMMANDS.items():
        if command.startswith(begin): command = f'{command} {options}'
    for old,new in DOWNLOADS.items(): command = command.replace(old, new)
    return command

def script(name):
    "The script of an installed command"
    return str(Path(sys.executable).parent/name)

def call(command):
    "A command in this process, as imports take longest: code, output, errors"
    out, err, code = io.StringIO(), io.StringIO(), 0
    name, *args = shlex.split(command)
    sys.argv = [script(name), *args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: runpy.run_path(script(name), run_name='__main__')
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
            if isinstance(e.code, str): print(e.code, file=sys.stderr)
        except BaseException:
            code = 1
            traceback.print_exc()
    return dict(code=code, out=out.getvalue(), err=err.getvalue())

def interrupted(command, at='epoch 1 of'):
    "The same in a process of its own, stopped by Ctrl-C once it has printed `at`: 'killed at any moment'"
    name, *args = shlex.split(command)
    p = subprocess.Popen([sys.executable, script(name), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # as in a terminal
    out = ''
    for line in p.stdout:
        if at and line.startswith(at):
            p.send_signal(signal.SIGINT)
            at = None
        out += line
    return dict(code=p.wait(), out=out, err='')

def run_commands(readme):
    "All commands in the order of README; the first is interrupted, as the second one resumes it"
    said = {}
    for command in commands(readme):
        first = command.startswith('densessl_pretrain photos/')
        said[command] = (interrupted if first else call)(reduced(command))
    return said

def find_rate(learn):
    "`lr_find`, which README promises: how many rates it tried"
    learn.lr_find(num_it=2, show_plot=False, suggest_funcs=())
    return len(learn.recorder.lrs)

def import_all():
    "Names of all modules, each imported"
    import densessl
    names = [m.name for m in pkgutil.walk_packages(densessl.__path__, 'densessl.')]
    for n in names: importlib.import_module(n)
    return names

def main(readme, folder, small=''):
    text = Path(readme).read_text(encoding='utf-8')
    os.chdir(folder)
    draw_folders()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        shown, names = run_python(text, PYTHON | (SMALLER if small else {}))
        rates = find_rate(names['learn'])
    said = run_commands(text)
    import densessl, fastcore
    print(json.dumps(dict(shown=shown, printed=printed.getvalue(), commands=said, rates=rates, modules=import_all(),
                          fastcore=fastcore.__version__, place=densessl.__file__)))

if __name__=='__main__': main(*sys.argv[1:])
