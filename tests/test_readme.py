"README as it is printed: its Python and its commands are executed, with small data"
import configparser, json, os, re, subprocess
from pathlib import Path

import readme_as_printed as printed
from processes import run_script

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')

SCRIPT = str(ROOT/'tests/readme_as_printed.py'), str(ROOT/'README.md')

def run_readme(python, folder, **env):
    "All that README shows, with this Python"
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='') | env
    r = subprocess.run([python, '-W', 'ignore', *SCRIPT, str(folder)], cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    return said(r)

def said(r):
    "What the script found"
    assert r.returncode == 0, f'{r.stdout[-2000:]}\n{r.stderr[-4000:]}'
    return json.loads(r.stdout.splitlines()[-1])

def rows(table):
    "Names of the models in a table of scores"
    return [l.split('|')[1].strip() for l in table.splitlines() if l.startswith('|')][2:]

def check(done, folder):
    "What README promises of each step"
    # Python: values as README prints them, and the frozen start beside the trained backbone
    values = re.findall(r'^```\n\n    (\S.*)$', README, flags=re.M)
    assert values and values == [v for v in done['shown'].values() if v in ('True', 'False')]
    report, = [v for k,v in done['shown'].items() if 'dense_report()' in k]
    models = rows(report)
    assert len(models) == 2 and re.search('before|start', models[0]) and 'epoch' in models[1], report
    assert 'epoch 2 of 2: loss ' in done['printed'] and done['rates'] >= 2
    assert (folder/'backbone.safetensors').exists()
    # commands: stopped by Ctrl-C, resumed to the end, scored, shown, packed
    codes = {k: v['code'] for k,v in done['commands'].items()}
    stopped = next(k for k in codes if k.startswith('densessl_pretrain photos/'))
    wrong = {k: v for k,v in done['commands'].items() if v['code'] != (130 if k == stopped else 0)}
    assert not wrong, json.dumps(wrong, indent=1)
    resumed = done['commands']['densessl_pretrain --resume --out runs/photos']['out']
    assert 'epoch 3 of 3: ' in resumed and 'written to runs/photos' in resumed, resumed
    assert len(list((folder/'runs').rglob('model.safetensors')))==2        # fine-tuned, and its random start
    assert list((folder/'shards').glob('*.tar')) and list(folder.glob('show*.html'))

def test_every_command_stands_in_readme():
    cfg = configparser.ConfigParser(delimiters='=')
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    scripts = {l.partition('=')[0].strip() for l in cfg['DEFAULT']['console_scripts'].splitlines()}
    assert {c.split()[0] for c in printed.commands(README)} == scripts

def test_readme_as_printed(tmp_path):
    "With small images: `test_newest` takes those of README"
    script, readme = SCRIPT
    check(said(run_script(script, [readme, tmp_path, 'small'], tmp_path, os.environ | dict(PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore'), timeout=900)), tmp_path)
