#!/usr/bin/env python3
"""The two commands of densessl, for a fresh machine with Python and pip; standard library only.

  python3 run.py pretrain [FOLDER] [--options]   pretrain; without FOLDER on drawn scenes (all options: pretrain --help)
  python3 run.py test                            all tests: every notebook top to bottom, then pytest

Each makes `.venv` beside this file and installs densessl there the first time, and again when the requirements change.
For those who edit the notebooks: `.venv/bin/python run.py readme` writes README.md from nbs/index.ipynb.
"""
# No f-strings: an old Python must get as far as its one clear sentence.
import configparser, hashlib, os, re, subprocess, sys, time

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, '.venv')
BIN  = os.path.join(VENV, 'Scripts' if os.name == 'nt' else 'bin')
STAMP = os.path.join(VENV, 'densessl-stamp.txt')

def settings():
    cfg = configparser.ConfigParser(delimiters='=')
    cfg.read(os.path.join(ROOT, 'settings.ini'), encoding='utf-8')
    return cfg['DEFAULT']

def check_python():
    "One sentence if this Python cannot do it"
    least = settings()['min_python']
    if sys.version_info[:2] < tuple(int(o) for o in least.split('.')):
        sys.exit('densessl needs Python {} or newer, this is {}.{} ({}): call run.py with a newer one.'.format(
            least, sys.version_info[0], sys.version_info[1], sys.executable))
    try: import ensurepip, venv
    except ImportError:
        sys.exit('This Python ({}) cannot make virtual environments: install its venv module '
                 '(Debian, Ubuntu: apt install python3-venv) and run the command again.'.format(sys.executable))

def tool(name):
    "Path of an installed command of `.venv`"
    return os.path.join(BIN, name + ('.exe' if os.name == 'nt' else ''))

def environ():
    "Environment in which the commands of `.venv` come first and nothing of another environment shows through"
    env = dict(os.environ, VIRTUAL_ENV=VENV, PATH=BIN + os.pathsep + os.environ.get('PATH', ''))
    for k in ('PYTHONHOME', 'PYTHONPATH', 'IN_TEST'): env.pop(k, None)
    return env

def wanted():
    "What `.venv` was made from: its place, this Python, and the files that say what to install"
    h = hashlib.sha256()
    for name in ('settings.ini', 'setup.py', 'pyproject.toml'):
        with open(os.path.join(ROOT, name), 'rb') as f: h.update(f.read())
    return '\n'.join([ROOT, sys.version.split()[0], h.hexdigest()]) + '\n'

def set_up():
    "Make `.venv` and install densessl with its development tools, unless that was done already"
    want, have = wanted(), ''
    if os.path.exists(STAMP):
        with open(STAMP, encoding='utf-8') as f: have = f.read()
    if have == want and os.path.exists(tool('python')): return
    print('Setting up {} (the first time this downloads torch and its libraries, several GB) ...'.format(VENV), flush=True)
    start = time.time()
    # made in another place or by another Python: nothing of it can be kept; without a stamp an install was cut short, so go on
    clear = ['--clear'] if have and have.split('\n')[:2] != want.split('\n')[:2] else []
    # Python compiles what is imported; all of torch and its libraries would take a minute
    pip = [tool('python'), '-m', 'pip', '--disable-pip-version-check', 'install', '--no-compile']
    if not sys.stdout.isatty(): pip.append('-q')
    for what, cmd in (('make the virtual environment', [sys.executable, '-m', 'venv'] + clear + [VENV]),
                      ('install densessl', pip + ['-e', '.[dev]'])):
        if subprocess.call(cmd, cwd=ROOT, env=environ()):
            sys.exit('Could not {}: the reason stands above; mend it and run the command again.'.format(what))
    with open(STAMP, 'w', encoding='utf-8') as f: f.write(want)
    print('Set up in {:.0f} s.'.format(time.time() - start), flush=True)

def pretrain(args):
    "Hand over to `densessl_pretrain`, in the folder the user stands in"
    cmd = [tool('densessl_pretrain')] + args
    if os.name == 'nt': return subprocess.call(cmd, env=environ())
    os.execve(cmd[0], cmd, environ())

def test():
    "All notebooks, then pytest, two at a time each; pytest's closing line comes last unless a notebook failed"
    # one thread a process: two processes with two threads each fight for two cores
    env, start = dict(environ(), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1'), time.time()
    print('Notebooks (nbdev_test):', flush=True)
    bad = subprocess.call([tool('nbdev_test'), '--n_workers', '2', '--do_print'], cwd=ROOT, env=env)
    verdict = 'Notebooks: {} in {:.0f} s.'.format('FAILED' if bad else 'passed', time.time() - start)
    print('{}\n\nTests (pytest):'.format(verdict), flush=True)
    pytest = [tool('python'), '-m', 'pytest', '-n', '2', '--dist', 'loadfile', '--no-loadscope-reorder']    # the order of conftest
    pytest += ['--durations=5', '--durations-min=1', 'tests']
    worse = subprocess.call(pytest, cwd=ROOT, env=env)
    if bad: print(verdict, 'Their names stand above.', flush=True)
    return 1 if bad or worse else 0

def readme_text():
    "README.md as `nbs/index.ipynb` makes it: no hidden cells, links to pages made to work from the top level"
    try: import nbformat, nbconvert
    except ImportError: sys.exit('nbconvert is missing: call this with .venv/bin/python, or pip install nbconvert.')
    nb = nbformat.read(os.path.join(ROOT, 'nbs', 'index.ipynb'), as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev_clean takes it away; it colors the code
    cells = []
    for c in nb.cells:
        if c.cell_type == 'code':
            if re.search(r'^#\|\s*hide\b', c.source, flags=re.M): continue
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
            if not c.source: continue
        cells.append(c)
    nb.cells = cells
    md, _ = nbconvert.MarkdownExporter().from_notebook_node(nb)
    md = re.sub(r'\]\((?![a-z]+:|#|/)([^)\s]+\.(?:ipynb|png))', r'](nbs/\1', md)
    md = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', md, flags=re.M))
    return '<!-- Made from nbs/index.ipynb by `run.py readme`: edit the notebook. -->\n\n' + md.strip() + '\n'

def main(args):
    what, rest = (args[0], args[1:]) if args else ('', [])
    if what not in ('pretrain', 'test', 'readme') or (rest and what != 'pretrain'):
        print(__doc__.strip())
        return 0 if what in ('-h', '--help') else 2
    if what == 'readme':
        with open(os.path.join(ROOT, 'README.md'), 'w', encoding='utf-8', newline='\n') as f: f.write(readme_text())
        return 0
    check_python()
    set_up()
    return pretrain(rest) if what == 'pretrain' else test()

if __name__ == '__main__':
    try: sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt: sys.exit('Stopped.')
