"What a run costs: counts, the fit, what was measured, sentences for what is wrong"
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from densessl import cost as page
from densessl.ground.core import InputError
from densessl.cost import CARDS, FITTED, IN_LEARNER, MEASURED, CountOperators, Operator, cost, count_step, hours, roofline
from densessl.methods.encoders import dense_encoder
from densessl.training.learner import methods

TINY = dict(patch_size=8, embed_dim=24, depth=1, num_heads=3)
TINY_CNN = dict(output_stride=8, stem_width=8, channels=[16, 32, 32, 32])


def tiny(method, batch=8, **args):
    config = methods[method].presets['scenes']
    kwargs = dict(arch='test_resnet', model_kwargs=TINY_CNN) if method=='clove' else dict(arch='vit_tiny_patch16_224', model_kwargs=TINY)
    return cost(method, batch=batch, config=config, **kwargs | args)


def flops_of(arch, size):
    with torch.device('meta'): net = dense_encoder(arch, img_size=size)
    with FakeTensorMode(), CountOperators() as count, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device='cpu'))
        net.tokens(torch.empty(2, 3, size, size))
    return sum(o.flops for o in count.operators)/2


@pytest.mark.parametrize('arch, D', [('vit_tiny_patch16_224', 192), ('vit_small_patch16_224', 384)])
@pytest.mark.parametrize('size', [96, 224])
def test_flops_of_a_vit_are_those_of_the_formula(arch, D, size):
    "Queries, keys, values, output and MLP: 12 N D^2 a block; attention: 2 N^2 D; patches: N 768 D; two FLOPs each"
    N = (size//16)**2
    assert flops_of(arch, size)==2*(12*(12*N*D**2 + 2*N**2*D) + N*3*16**2*D)
    if (arch, size)==('vit_small_patch16_224', 224): assert round(flops_of(arch, size)/2e9, 1)==4.6


def test_the_roofline_is_the_longer_of_arithmetic_and_memory():
    card = page.Card('round numbers', bf16=100, fp32=10, tb_s=1, gib=1)
    busy, moving, single = Operator(1e12, 10, True), Operator(0, 10**9, True), Operator(1e12, 10, False)
    for operators, seconds in (([busy], .01), ([moving], .001), ([single], .1), ([busy, moving, single], .111)):
        assert roofline(operators, card)==pytest.approx(seconds)


@pytest.mark.parametrize('method', ['flsl', 'clove', 'dino'])
def test_memory_that_is_counted_is_held_by_the_step(method):
    "Weights, their gradients and what the optimizer keeps are fixed; all else is in proportion to the batch"
    def built():
        arch, kwargs = ('test_resnet', TINY_CNN) if method=='clove' else ('vit_tiny_patch16_224', TINY)
        config = methods[method].presets['scenes']
        return page._built(method, arch, replace(config, n_prototypes=64) if method=='flsl' else config, kwargs)
    model = built()[0]
    weights = sum(p.numel() for p in model.parameters())+sum(b.numel() for b in model.buffers())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    few, many = (count_step(*built(), n, bf16=False) for n in (64, 256))
    assert few.fixed==many.fixed and few.fixed==pytest.approx(4*(weights+3*trained), rel=.01)
    assert many.pixels==4*few.pixels and many.growing==pytest.approx(4*few.growing, rel=.1)
    seconds = [roofline(s.operators, CARDS['H100']) for s in (few, many)]
    assert seconds[0]<seconds[1]<4*seconds[0]


@pytest.mark.parametrize('method', list(methods))
def test_every_method_has_a_cost(method):
    m, cnn = methods[method], 'vit' not in methods[method].scene_arch
    arch, kwargs = ('test_resnet', TINY_CNN) if cnn else ('vit_tiny_patch16_224', TINY)
    got = page.cost(method, arch, batch=64, config=m.presets['scenes'], model_kwargs=kwargs)
    assert got.source=='roofline' and got.images_per_second>0 and got.gib>0


@pytest.mark.parametrize('method', ['flsl', 'clove', 'dino'])
def test_a_larger_batch_takes_more_memory_and_is_no_slower(method):
    found = [tiny(method, n) for n in (8, 64, 512, 4096, 2**15, 2**16)]
    assert all(a.gib<b.gib and a.images_per_second<=b.images_per_second*(1+1e-9) for a,b in zip(found, found[1:]))
    assert found[1].images_per_second==pytest.approx(8*found[0].images_per_second)           # waits for the launches
    assert found[-1].images_per_second==pytest.approx(found[-2].images_per_second)           # waits for the card
    assert {c.source for c in found}=={'roofline'}


def test_a_card_with_more_of_everything_is_quicker():
    at = {k: tiny('flsl', 2**15, card=k).images_per_second for k in CARDS}
    assert at['H200']>at['H100']>at['A100']>at['L4'] and at['RTX4090']>at['L4']
    assert tiny('dino', 2**15).images_per_second>tiny('dino', 2**15, bf16=False).images_per_second


PLAIN = [m for m in MEASURED if not m.compiled]


def test_what_was_measured_is_given_back():
    for m in PLAIN:
        found = cost(m.method, m.arch, m.img_size, m.batch, m.card, m.bf16)
        assert found==(m.in_learner or IN_LEARNER*m.rate, m.gib, 'measured')
        assert not m.in_learner or m.in_learner/m.rate==pytest.approx(IN_LEARNER, abs=.02)


def test_the_factor_is_near_that_of_every_measured_step():
    "Share of the roofline that each step reached, its views left out; and what is predicted for the whole of it"
    shares, ratios = {}, {}
    for m in PLAIN:
        step, times = page._counted(m.method, m.arch, m.img_size, (), m.bf16), m.batch/page.COUNTED
        roof, name = times*roofline(step.operators, CARDS[m.card]), (m.method, m.batch, m.bf16)
        predicted = page.seconds_of_step(len(step.operators), roof, times*step.pixels, CARDS[m.card], m.bf16)
        ratios[name] = predicted/(m.batch/m.rate)
        if m.batch>=256: shares[name] = roof/(m.batch/m.rate-1e-3*m.views_ms)/(FITTED.efficiency if m.bf16 else FITTED.efficiency_fp32)
        memory = (step.fixed+step.growing*times)/2**30/m.gib
        print(f'{m.method} {m.batch} {"bf16" if m.bf16 else "float32"}: predicted over measured, time {ratios[name]:.3f}, memory {memory:.3f}')
        assert .8<memory<1.02
    assert all(abs(r-1)<.2 for r in [*shares.values(), *ratios.values()])


def test_counting_draws_no_random_number_and_leaves_no_mode():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    page._counted.cache_clear()
    tiny('flsl'), tiny('clove')
    assert torch.equal(before[0], torch.get_rng_state()) and before[1]==random.getstate() and (before[2]==np.random.get_state()[1]).all()
    assert type(torch.ones(1)) is torch.Tensor and not torch.is_autocast_enabled('cpu')


def test_hours_and_epochs():
    assert hours(1000, 3600, 100)==pytest.approx(.1) and hours(1000, 3600, 100, cards=10)==pytest.approx(.1/9)
    assert [page.enough_epochs(s) for s in (0, 1, 4, 5, 1000)]==[500, 500, 125, 100, 100]


@pytest.mark.parametrize('args, message', [
    (dict(method='simclr'), "no method 'simclr': use one of flsl, clove, dino"), (dict(card='V100'), "card 'V100': use one of H100"),
    (dict(batch=1), 'batch must be a whole number, at least 2, got 1'), (dict(batch=None), 'batch is the number'), (dict(batch=2.5), 'got 2.5'),
    (dict(img_size=0), 'img_size must be a whole number'), (dict(img_size=100), 'do not divide'), (dict(arch='vit_smal_patch16_224'), 'did you mean')])
def test_what_is_wrong_is_one_sentence(args, message):
    with pytest.raises(InputError, match=message) as e: cost(**args)
    assert '\n' not in str(e.value)
