"All metadata stands in settings.ini, which nbdev reads too"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
cfg = ConfigParser(delimiters='=')
cfg.read(here/'settings.ini', encoding='utf-8')
c = cfg['DEFAULT']
status = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}[c['status']]
readme = here/'README.md'

setup(
    name=c['lib_name'], version=c['version'], description=c['description'], keywords=c['keywords'],
    author=c['author'], author_email=c['author_email'], url=c['git_url'], license='Apache-2.0',
    classifiers=[f'Development Status :: {status}', f"Intended Audience :: {c['audience']}", f"Natural Language :: {c['language']}",
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    packages=find_packages(include=['densessl', 'densessl.*']), include_package_data=True,
    python_requires=f">={c['min_python']}", install_requires=c['requirements'].split(),
    extras_require={'dev': c['dev_requirements'].split()},
    entry_points={'console_scripts': c['console_scripts'].split(), 'nbdev': [f"{c['lib_name']}={c['lib_name']}._modidx:d"]},
    zip_safe=False,
)
