"Settings of the documentation site; `tools/site_pages.py` writes its pages from the notebooks"
from pathlib import Path
from nbdev.config import read_version

root = Path(__file__).resolve().parents[1]
project,author,language = 'adahessian_fastai','adahessian_fastai contributors','en'
release = read_version(root/project)
copyright = f'{author}, Apache-2.0'
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx_design', 'sphinx-mathjax-offline']
exclude_patterns = ['benchmarks', 'nbs']

nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['amsmath', 'attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath', 'html_image']
myst_heading_anchors = 3
myst_dmath_double_inline = True

add_module_names = False
toc_object_entries_show_parents = 'hide'

html_theme = 'furo'
html_title = f'{project} {release}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_extra_path = [str(root/'_proc/llms.txt')]
html_show_sphinx = False
html_copy_source = False
copybutton_exclude = '.linenos, .gp, .go'
