"""Processes that begin with torch, fastai and densessl already imported: each is forked from one server, which has done nothing but import.

Importing takes longer than what most tests have to say. A few tests start Python anew instead, as a user does: `test_readme`, `test_newest`, some of `test_cli`."""
import multiprocessing as mp, os, runpy, signal, subprocess, sys, tempfile, warnings
from multiprocessing import reduction

import torch.multiprocessing

IMPORTED = 'densessl.all', 'densessl.cli', 'densessl.show', 'densessl.training.distributed', 'fastai.distributed', 'matplotlib.pyplot'


def server():
    "Where processes come from"
    ctx = mp.get_context('forkserver')
    ctx.set_forkserver_preload(list(IMPORTED))
    return ctx


def in_ranks(f, world, tmp_path):
    "`f(rank, world, init, out)` in as many processes; `init` is where they find each other, an error of one is raised here"
    server()
    args = world, f'file://{tmp_path}/init', str(tmp_path)
    torch.multiprocessing.start_processes(f, args, world, start_method='forkserver')


class Stream:
    "A file descriptor that goes along to a process"
    def __init__(self, fd): self.fd = fd
    def __reduce__(self): return _received, (reduction.DupFd(self.fd),)

def _received(dup): return Stream(dup.detach())


def _enter(script, args, cwd, env, threads, streams):
    "In the process: what Python does for `python script.py ...`"
    for i,s in enumerate(streams): os.dup2(s.fd, i)
    for s in {s.fd for s in streams}: os.close(s)
    for i,name in enumerate(('stdin', 'stdout', 'stderr')):
        setattr(sys, name, open(i, 'w' if i else 'r', buffering=1 if i and os.isatty(i) else -1, closefd=False))
    sys.stderr.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for s in (signal.SIGTERM, signal.SIGHUP): signal.signal(s, signal.SIG_DFL)
    mp.set_start_method(None, force=True)           # how its own children begin: as those of any script
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for o in filter(None, env.get('PYTHONWARNINGS', '').split(',')): warnings._setoption(o)
    torch.set_num_threads(threads)
    sys.argv, sys.path[0] = [script, *args], str(cwd)
    runpy.run_path(script, run_name='__main__')


class Script:
    "A script in a process of its own; `stdin` and the others are file descriptors, which stay open here"
    def __init__(self, script, args, cwd, env=os.environ, threads=1, stdin=None, stdout=None, stderr=None):
        with open(os.devnull, 'r+') as null:
            streams = [Stream(null.fileno() if o is None else o) for o in (stdin, stdout, stderr)]
            self.process = server().Process(target=_enter, args=(str(script), [*map(str, args)], str(cwd), dict(env), threads, streams))
            self.process.start()
        self.pid = self.process.pid

    def send_signal(self, signum):
        if self.poll() is None: os.kill(self.pid, signum)

    def poll(self): return self.process.exitcode

    def wait(self, timeout=300):
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.poll()


def run_script(script, args, cwd, env=os.environ, input='', timeout=300, **kwargs):
    "The same, to its end, as `subprocess.run` has it"
    with tempfile.TemporaryFile('w+') as given, tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        given.write(input)
        given.seek(0)
        p = Script(script, args, cwd, env, stdin=given.fileno(), stdout=out.fileno(), stderr=err.fileno(), **kwargs)
        p.wait(timeout)
        said = []
        for f in (out, err):
            f.seek(0)
            said.append(f.read())
        return subprocess.CompletedProcess([script, *args], p.poll(), *said)
