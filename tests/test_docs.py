"The documentation can be built, up to Quarto: what `nbdev_docs` does to the pages before it calls Quarto"
import os, re, shutil
from pathlib import Path

import pytest

from processes import run_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = 'from nbdev.serve import proc_nbs\nproc_nbs(n_workers=0, force=True)\n'

def pages(d):
    "Paths of all pages below `d`, relative to it"
    return {p.relative_to(d).as_posix() for p in d.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}

def process(d):
    "Run nbdev's processing in the project at `d`: import cells and exported cells are executed, lessons are not"
    (d/'process.py').write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return run_script('process.py', (), d, env, timeout=600)

@pytest.fixture
def project(tmp_path):
    "What the processing reads: settings and an empty folder for pages"
    d = tmp_path/'densessl'
    d.mkdir()
    for o in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/o, d/o)
    return d

def test_docs_are_processed_up_to_quarto(project):
    shutil.copytree(ROOT/'nbs', project/'nbs', ignore=shutil.ignore_patterns('.*', 'sidebar.yml'))
    r = process(project)
    assert r.returncode == 0, f'a page cannot be processed for the documentation:\n{r.stdout}{r.stderr}'
    mixed = re.findall(r'Found cells containing imports and other code.*?---\n(.*?)\n---', r.stderr, flags=re.S)
    assert not mixed, 'imports share a cell with other code, which the docs would run without the lessons before it:\n' + '\n\n'.join(mixed)
    assert pages(project/'_proc') == pages(project/'nbs')
    # the result is a page of documentation: signatures of what it exports in place of the source
    assert 'mean_shift(' in (done := (project/'_proc/20_theory.attention.ipynb').read_text()) and '#| export' not in done

def test_a_page_that_mixes_imports_and_lessons_is_caught(project):
    (project/'nbs').mkdir()
    cell = '{"cell_type": "code", "execution_count": null, "id": "%s", "metadata": {}, "outputs": [], "source": [%s]}'
    cells = cell % ('a', r'"#| export\n", "def f(): pass"') + ', ' + cell % ('b', r'"import io\n", "of_a_lesson.read()"')
    (project/'nbs/00_page.ipynb').write_text('{"cells": [%s], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}' % cells)
    r = process(project)
    assert r.returncode and 'of_a_lesson' in r.stderr
