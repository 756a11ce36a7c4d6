"`densessl_compare`: methods, seeds and nulls on the same scenes; stopped, resumed, grown; mistakes before any training"
import json

import pytest

from densessl import compare as page
from densessl.compare import compare, conclusion, entries, ranked
from densessl.evaluation.scores import Score
from densessl.ground.core import InputError
from densessl.training.learner import methods

TINY = dict(n_scenes=16, bs=8, img_size=32, model_kwargs='output_stride=8,stem_width=8,channels=[8,8,8,16]', minutes=.001)

def names(scores): return {s.model for s in scores}

def test_a_comparison_is_stopped_resumed_and_grown(tmp_path, monkeypatch, capsys):
    out, trained = tmp_path/'compare', []
    whole = page.train
    def train(run, **kwargs):
        trained.append(run.out.name)
        if len(trained)==2: raise KeyboardInterrupt
        whole(run, **kwargs)
    monkeypatch.setattr(page, 'train', train)
    with pytest.raises(KeyboardInterrupt): compare(methods='byol', nulls=True, out=out, **TINY)
    assert trained==['byol-0', 'byol-null-0']
    scores = compare(out=out, resume=True)
    assert trained[2:]==['byol-null-0'] and names(scores)=={'random start of test_resnet', 'byol', 'byol (null)'}
    settings = methods['byol'].null
    assert settings and json.loads((out/'compare.json').read_text())['arguments']['nulls'] is True
    grown = compare(out=out, resume=True, methods='clove', seeds=2)
    assert trained[3:]==['clove-0', 'clove-null-0', 'byol-1', 'byol-null-1', 'clove-1', 'clove-null-1']
    kept = {(s.model, s.probe, s.value) for s in scores if not s.model.startswith('random')}
    assert kept <= {(s.model, s.probe, s.value) for s in grown}
    assert sum(s.model=='random start of test_resnet' and s.probe=='linear' for s in grown)==2
    assert {p.name for p in out.iterdir()} >= {'comparison.txt', 'comparison.png', 'scores.json', 'byol-0', 'clove-1'}
    assert (out/'byol-0'/'backbone.safetensors').exists() and not (out/'byol-0'/'checkpoints').exists()
    said = capsys.readouterr().out
    assert '| random start of test_resnet |' in said and 'Best by linear: ' in said
    for changed in (dict(minutes=3), dict(seed=7), dict(img_size=64)):
        with pytest.raises(InputError, match=r'has other settings: \w+ was .*, now'): compare(out=out, resume=True, **changed)
    with pytest.raises(InputError, match='holds files already'): compare(methods='byol', out=out, **TINY)
    (out/'clove-1'/'scores.json').write_text('{"sco')
    with pytest.raises(InputError, match='clove-1 cannot be read: move it away to train it again'): compare(out=out, resume=True)

def test_all_methods_get_the_same_time(monkeypatch):
    "A step of CLoVE that takes three times as long as BYOL's: a third of its steps, whatever an epoch holds"
    seconds = dict(byol=.1, clove=.3)
    monkeypatch.setattr(page, 'paced_step', lambda run: (seconds[run.job.method], ''))
    options = {k: v for k,v in TINY.items() if k!='minutes'} | dict(seed=0, arch='test_resnet', n_scenes=80)
    def planned(minutes): return {k: (v['epochs'], v['epoch_steps']) for k,v in page.plan(entries('byol,clove'), options, minutes, {}).items()}
    assert planned(.1)==dict(byol=(6, 10), clove=(2, 10))
    assert planned(.04)==dict(byol=(3, 8), clove=(1, 8))

def test_an_overwritten_comparison_leaves_no_scores(tmp_path, monkeypatch):
    "A method of the old one, added later, is trained and not read"
    out, trained = tmp_path/'compare', []
    whole = page.train
    monkeypatch.setattr(page, 'train', lambda run, **kwargs: (trained.append(run.out.name), whole(run, **kwargs)))
    compare(methods='byol,clove', out=out, **TINY)
    (out/'mine').mkdir()
    compare(methods='byol', out=out, overwrite=True, **TINY)
    assert not (out/'clove-0').exists() and (out/'mine').exists()
    compare(out=out, resume=True, methods='clove')
    assert trained==['byol-0', 'clove-0', 'byol-0', 'clove-0']

def test_a_network_is_chosen_once(tmp_path):
    "By the first method, also when others are added; settings hold for all"
    out = tmp_path/'compare'
    tiny = {k: v for k,v in TINY.items() if k!='model_kwargs'} | dict(settings='freeze_norm=true')
    compare(methods='byol', out=out, **tiny)
    scores = compare(out=out, resume=True, methods='lejepa')
    assert names(scores)=={'byol', 'lejepa', 'random start of test_resnet'}
    kept = json.loads((out/'compare.json').read_text())['arguments']
    assert kept['methods']=='byol,lejepa' and kept['arch']=='test_resnet' and kept['settings']=='freeze_norm=true'

@pytest.mark.parametrize('kwargs,words', [
    (dict(methods='byol,simclr'), "no method 'simclr'"), (dict(methods='byol, byol'), 'names one twice'), (dict(methods=' ,'), 'names nothing'),
    (dict(seeds=0), 'seeds must be'), (dict(minutes=0), 'minutes must be above 0'), (dict(bs=1), 'bs must be'),
    (dict(methods='byol', arch='resnet1'), "byol: timm has no model 'resnet1'"), (dict(methods='byol', baseline='nope'), "no model 'nope'"),
    (dict(methods='byol,mae', arch='test_resnet', img_size=64), 'mae: test_resnet cannot hide patches'), (dict(resume=True), 'needs --out'), (dict(resume=True, out='nowhere'), 'no folder of a comparison'),
])
def test_mistakes_come_before_any_training(tmp_path, monkeypatch, kwargs, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, 'train', None)
    with pytest.raises(InputError, match=words): compare(**kwargs)
    assert not any(tmp_path.iterdir())

def made(model, *values): return [Score(model, 'linear', v, (), {}) for v in values]

def test_what_may_be_concluded():
    assert 'beyond the spread' in conclusion(made('a', .31, .32, .30)+made('b', .25, .24, .26))
    assert 'b cannot be told from it' in conclusion(made('a', .31, .25, .29)+made('b', .27, .26, .30))
    assert 'One seed' in conclusion(made('a', .31)+made('b', .2))
    said = conclusion(made('published', .5)+made('a', .31)+made('b', .2), 'published')
    assert said.startswith('Best by linear: a with 31.0') and said.endswith(' published has 50.0.')

def test_ranked_counts_a_start_once_a_seed():
    "Methods whose views give it other statistics: their mean"
    found = {e: made('start', .2+.01*e.seed+.02*(e.method=='dino'))+made(e.label, .3 if e.method=='dino' else .25) for e in entries('byol,dino', 2)}
    scores = ranked(found)
    assert [s.model for s in scores]==['dino']*2+['byol']*2+['start']*2
    assert sorted(s.value for s in scores if s.model=='start')==pytest.approx([.21, .22])
