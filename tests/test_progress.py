"The progress of a run as a user sees it: a real process in a terminal of 80 columns, and one whose output goes to a file"
import os, re, signal

import numpy as np
import pytest
from PIL import Image

from processes import Script

SCRIPT = 'import sys\nfrom densessl.cli import densessl_pretrain\nsys.exit(densessl_pretrain())\n'
ARGS = ('photos --arch vit_tiny_patch16_224 --preset scenes --img_size 32 --model_kwargs patch_size=8,embed_dim=24,depth=1,num_heads=3 '
        '--bs 8 --workers 0 --epochs 5 --score_every 2 --out run').split()
ENV = {k: v for k,v in os.environ.items() if k not in ('COLUMNS', 'LINES')} | dict(PYTHONWARNINGS='ignore::FutureWarning')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with photographs"
    home, rng = tmp_path_factory.mktemp('progress'), np.random.default_rng(0)
    (home/'photos').mkdir()
    for i in range(44):
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC).save(home/f'photos/{i}.jpg')
    (home/'script.py').write_text(SCRIPT)
    return home


def in_terminal(home, args, columns=80, stop_at=None):
    "All that a command writes to a terminal; SIGINT once `stop_at` is seen"
    pty = pytest.importorskip('pty')
    import fcntl, struct, termios
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    p = Script('script.py', args, home, ENV, stdin=its, stdout=its, stderr=its)
    os.close(its)
    out = b''
    while True:
        try: new = os.read(mine, 2**16)
        except OSError: break                # the other end is closed
        if not new: break
        out += new
        if stop_at and re.search(stop_at, out):
            p.send_signal(signal.SIGINT)
            stop_at = None
    os.close(mine)
    return p.wait(60), out.decode()


def screen(text):
    "The lines that are left on a screen that does not wrap: a carriage return goes back to the first column"
    lines = []
    for raw in text.replace('\r\n', '\n').split('\n'):
        line = []
        for part in raw.split('\r'): line[:len(part)] = part
        lines.append(''.join(line).rstrip())
    return lines


@pytest.fixture(scope='module')
def runs(home):
    "A run in a terminal, stopped after its second epoch or in the third; and the rest of it, into a file"
    code, terminal = in_terminal(home, ARGS, stop_at=rb'epoch 2 of 5: ')
    with open(home/'log.txt', 'w') as f:
        rest = Script('script.py', ['--resume', '--out', 'run'], home, ENV, stdout=f.fileno(), stderr=f.fileno()).wait()
    log = (home/'log.txt').read_bytes().decode()
    assert (code, rest) == (128+signal.SIGINT, 0), terminal + log
    return terminal, log


def test_bar_fits_the_terminal(runs):
    bars = re.findall(r'\r(epoch \d+ of 5 [^\r\n]*)', runs[0])
    assert bars and max(map(len, bars)) < 80
    numbers = r'epoch 2 of 5 \[[#.]+\] \d/\d  \d\d:\d\d left  [\d.]+ img/s  data \d+ %  \d+\.\d GB'
    assert any(re.match(numbers, b) for b in bars), bars


def test_finished_epochs_and_other_lines_stand_alone(runs):
    lines = screen(runs[0])
    assert sum(bool(re.match(r'epoch [12] of 5: loss [\d.]+, valid loss ', l)) for l in lines) == 2, lines
    assert not [l for l in lines if re.match(r'epoch \d of 5 ', l) and 'SIGINT' not in l and not l.startswith('epoch 3')], lines
    assert all(len(l) < 80 for l in lines if re.match('epoch [12] of 5:', l))
    assert any(l.startswith('before training: ') for l in lines) and any(l.startswith('stopped') for l in lines), lines


def test_a_file_gets_one_line_an_epoch(runs):
    "Also after a resume: it begins with the third epoch"
    assert '\r' not in runs[1]
    said = [l for l in runs[1].splitlines() if re.match(r'epoch \d of 5:', l)]
    assert [l.split(':')[0] for l in said] == ['epoch 3 of 5', 'epoch 4 of 5', 'epoch 5 of 5'], runs[1]
    assert 'left' in said[1] and 'left' not in said[2]
    assert all('waiting for data' in l and 'img/s' in l and 'valid loss' in l for l in said), said


def test_a_run_outlives_its_reader_and_is_saved_with_its_terminal(home):
    "The rest of what a broken pipe does not take is on standard error; SIGHUP, as from a terminal that is closed, stops the run as SIGTERM does"
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    p = Script('script.py', [*ARGS[:-1], 'unread'], home, ENV, stdout=its_out, stderr=its_err)
    for fd in (its_out, its_err): os.close(fd)
    with open(out) as f: f.readline()
    said = []
    with open(err) as f:
        for line in f:
            said.append(line)
            if line.startswith('epoch 2 of 5: '): p.send_signal(signal.SIGHUP)
    said = ''.join(said)
    assert p.wait(60)==128+signal.SIGHUP and said.count('has no reader any more')==1 and 'Traceback' not in said, said
    assert 'epoch 1 of 5, scores' not in said and 'epoch 2 of 5, scores: ' in said and said.endswith('To resume: densessl_pretrain --resume --out unread\n'), said
