"What a user gets: the wheel alone, with the newest fastai and fastcore, none of the pins of development"
import hashlib, os, re, shutil, subprocess, sys, sysconfig, venv
from pathlib import Path

import pytest

from test_readme import ROOT, check, run_readme

USER = ROOT/'.venv-user'
BIN = USER/('Scripts' if os.name == 'nt' else 'bin')
NEWEST = ('fastai', 'fastcore>=2', 'fastprogress', 'fasttransform')
COMMANDS = ('densessl_pretrain', 'densessl_evaluate', 'densessl_show', 'densessl_shard', 'densessl_transfer', 'densessl_compare')

def clean():
    "Environment variables without what leads to this checkout"
    return {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME', 'IN_TEST')}

def pip(*args):
    "pip for `.venv-user`, run from here: pip need not be installed there"
    cmd = [sys.executable, '-m', 'pip', '--python', str(BIN/'python'), '--disable-pip-version-check', *args]
    return subprocess.run(cmd, env=clean(), capture_output=True, text=True, timeout=600)

def build_wheel(folder):
    "The wheel of this checkout, built from a copy"
    src = folder/'src'
    src.mkdir()
    for o in ('README.md', 'LICENSE', 'CHANGELOG.md', 'MANIFEST.in', 'settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(ROOT/o, src/o)
    shutil.copytree(ROOT/'densessl', src/'densessl', ignore=shutil.ignore_patterns('__pycache__'))
    cmd = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '--no-deps', '--no-build-isolation', '-q', '-w', str(folder), str(src)]
    r = subprocess.run(cmd, env=clean(), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    wheel, = folder.glob('densessl-*.whl')
    return wheel

@pytest.fixture(scope='module')
def user(tmp_path_factory):
    """`.venv-user`: the wheel and the newest fastai; torch and the other large packages are those of this environment.

    They are reached by a path that comes after the environment's own, so nothing is downloaded twice."""
    wheel = build_wheel(tmp_path_factory.mktemp('wheel'))
    stamp, large = USER/'stamp.txt', sysconfig.get_paths()['purelib']
    want = '\n'.join([large, sys.version, *NEWEST, hashlib.sha256((ROOT/'settings.ini').read_bytes()).hexdigest()])
    if not stamp.exists() or stamp.read_text() != want:
        venv.create(USER, clear=True, with_pip=False)
        own = subprocess.run([BIN/'python', '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])'], capture_output=True, text=True, check=True).stdout.strip()
        (Path(own)/'large.pth').write_text(large + '\n')
        r = pip('install', '-q', '--no-compile', '--upgrade', *NEWEST)
        if r.returncode and re.search('NewConnectionError|Temporary failure in name resolution', r.stderr): pytest.skip('pip cannot reach an index')
        assert r.returncode == 0, r.stderr
        stamp.write_text(want)
    r = pip('install', '-q', '--no-deps', '--force-reinstall', str(wheel))
    assert r.returncode == 0, r.stderr
    return BIN

def test_readme_in_the_newest_environment(user, tmp_path):
    done = run_readme(str(user/'python'), tmp_path, PYTHONPATH='')
    assert int(done['fastcore'].split('.')[0]) >= 2 and Path(done['place']).is_relative_to(USER), done['place']
    assert len(done['modules']) > 30
    check(done, tmp_path)

@pytest.mark.parametrize('command', COMMANDS)
def test_help_in_the_newest_environment(user, tmp_path, command):
    r = subprocess.run([user/command, '--help'], cwd=tmp_path, env=clean(), capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and f'usage: {command}' in r.stdout, r.stderr

@pytest.mark.parametrize('spelling', ('_', '-'))
def test_both_spellings_in_the_newest_environment(user, tmp_path, spelling):
    "fastcore 1 and 2 spell options differently; ours answer to both, and only the value that is no number is refused"
    options = [o.replace('_', spelling) for o in ('--model_kwargs', 'depth=1', '--save_minutes', '3', '--n_scenes', '8', '--img_size', 'ten')]
    r = subprocess.run([user/'densessl_pretrain', *options], cwd=tmp_path, env=clean(), capture_output=True, text=True, timeout=120)
    assert r.returncode == 2 and "--img_size needs a whole number, got 'ten'" in r.stderr, r.stderr
