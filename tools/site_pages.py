"Writes the pages of the documentation site in _proc: the notebooks with their API made readable, `docs/*.md`, changelog and contributing guide"
import ast,io,json,posixpath,re,tokenize
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path
from shutil import copy,rmtree
from fastcore.nbio import read_nb
from nbdev.config import nbpath2html
from nbdev.doclinks import NbdevLookup
from results import filled

root = Path(__file__).resolve().parents[1]
out,lib = root/'_proc','adahessian_fastai'
defs = ast.FunctionDef,ast.ClassDef
first_guides = ['start', 'which', 'hyperparameters', 'benchmarks'] # The others follow by name
first_stories = ['transfer', 'imagenette', 'pytorch', 'toys', 'curvature', 'translation', 'hessian_free', 'pinn'] # As a learner goes, then the rest
main_names = ['adahessian', 'adahessian_paper', 'sophia', 'hessian_free', 'sassha', 'CurvatureRecorder', 'Learner.curvature_summary',
    'compare_optimizers', 'Budget', 'GNB', 'Problem'] # What people ask for first; one that does not exist is left out
papers = {'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'}
re_link = re.compile(r'(\]\(|<img[^>]* src=")(?![a-z]+:|#)([^)"\s#]+)')
re_code = re.compile(r'(?<![`\[])`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)')

# Reading notebooks

def place(names, name): return names.index(name) if name in names else len(names)
def notebooks(): return sorted(p for p in (root/'nbs').glob('*.ipynb') if p.name[0] not in '_.')
def guides():
    "The pages of docs/ in reading order"
    return sorted((root/'docs').glob('*.md'), key=lambda p: (place(first_guides, p.stem), p.name))

def stories():
    "The notebooks that make no module, in a learner's order"
    found = [p for p in notebooks() if not module_name(read_nb(p)) and p.name!='index.ipynb']
    return sorted(found, key=lambda p: (place(first_stories, p.stem.split('.')[-1]), p.name))

def rooms(low=0, high=99):
    "The notebooks that make modules, with numbers from `low` to `high`"
    found = [p for p in notebooks() if module_name(read_nb(p)) and p.name!='index.ipynb']
    return [p for p in found if low<=int(re.match(r'\d+', p.name)[0])<=high]

def kinds(): return {'Optimizers': rooms(16, 19), 'Look and compare': rooms(20), 'Inside': rooms(0, 15)}

def page_name(p): return nbpath2html(Path(p.name)).with_suffix('.ipynb').as_posix()
def module_name(nb): return next((d for c in nb.cells if (d := c.directive('default_exp'))), None)
def is_export(c): return c.cell_type=='code' and bool({'export', 'exports'} & set(c.directives))
def source(c): return re.sub(r'^(#\|.*\n?)+', '', c.source).strip()
def is_patch(node): return any(ast.unparse(d).startswith('patch') for d in getattr(node, 'decorator_list', []))

def shown_name(node):
    "The public name that a top-level `node` of an exported cell defines, `None` for anything else"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name): name = node.targets[0].id
    elif isinstance(node, defs): name = node.name
    else: return None
    if name.startswith('_'): return None
    return f'{ast.unparse(node.args.args[0].annotation)}.{name}' if is_patch(node) else name

@lru_cache
def public_names():
    "Full name by public name, for every exported name of every notebook"
    res = {}
    for nb in map(read_nb, notebooks()):
        for node in (n for c in nb.cells if is_export(c) for n in ast.parse(source(c)).body):
            if name := shown_name(node): res.setdefault(name, f'{lib}.{module_name(nb)}.{name}')
    return res

# Descriptions of functions and classes

def comments(src):
    "The comment of each line of `src`"
    toks = tokenize.generate_tokens(io.StringIO(src).readline)
    return {t.start[0]: t.string.lstrip('# ').strip() for t in toks if t.type==tokenize.COMMENT}

def parameters(node):
    "The arguments of function `node`, in order, with `*` and `**` in front of the collecting ones"
    a = node.args
    star = [(f'*{a.vararg.arg}', a.vararg)] if a.vararg else []
    kw = [(f'**{a.kwarg.arg}', a.kwarg)] if a.kwarg else []
    return [*((o.arg, o) for o in a.posonlyargs+a.args), *star, *((o.arg, o) for o in a.kwonlyargs), *kw]

def on_one_line(node):
    "Does the signature of function `node` fit into one line?"
    return node.body[0].lineno>node.lineno and all(o.end_lineno==node.lineno for _,o in parameters(node))

def returned(node, notes):
    "The docment behind the closing parenthesis of function `node`"
    if on_one_line(node): return notes.get(node.lineno)
    params = [o.end_lineno for _,o in parameters(node)]
    first,last = max(params, default=node.lineno),node.body[0].lineno
    return next((notes[i] for i in range(first+1, last) if i in notes), None)

def default_values(node, src):
    "The defaults of function `node` in `src` by the name of their parameter, as written"
    a = node.args
    pairs = [*zip([*a.posonlyargs, *a.args][::-1], a.defaults[::-1]), *zip(a.kwonlyargs, a.kw_defaults)]
    return {o.arg: ast.get_source_segment(src, d) for o,d in pairs if d}

def docments_table(node, src, skip_self=False):
    "A table of the parameters of function `node` in `src` that have a docment"
    given,notes = default_values(node, src),comments(src)
    def written(nm, o): return f"`{nm}{f': {ast.unparse(o.annotation)}' if o.annotation else ''}{f' = {given[nm]}' if nm in given else ''}`"
    own = [] if on_one_line(node) else parameters(node)[skip_self:] # The comment of a single line is that of the result
    rows = [(written(nm, o), notes[o.lineno]) for nm,o in own if o.lineno in notes]
    if ret := returned(node, notes): rows.append((f'returns{f" `{ast.unparse(node.returns)}`" if node.returns else ""}', ret))
    if not rows: return ''
    cells = '\n'.join(f"| {a.replace('|', chr(92)+'|')} | {linked(b).replace('|', chr(92)+'|')} |" for a,b in rows)
    return f'{{.docments}}\n| Parameter | Meaning |\n|---|---|\n{cells}'

def signature(node, src, skip_self=False):
    "The arguments of function `node` in `src` with their defaults as written, without annotations"
    bare = ast.parse(ast.unparse(node)).body[0]
    for _,o in parameters(bare): o.annotation = None
    as_written = lambda ds: [d and ast.Name(ast.get_source_segment(src, d)) for d in ds]
    bare.args.defaults,bare.args.kw_defaults = as_written(node.args.defaults),as_written(node.args.kw_defaults)
    if skip_self: bare.args.args = bare.args.args[1:]
    return f'({ast.unparse(bare.args)})'

def directive(kind, head, body, level=4):
    fence = ':'*level
    return f"{fence}{{py:{kind}}} {head}\n\n{body}\n{fence}"

def described(node, src, name, mod, kind='function', level=4):
    "The description of function `node` in `src` as a directive"
    is_method = kind=='method'
    body = '\n\n'.join(filter(None, [linked(ast.get_docstring(node) or ''), docments_table(node, src, is_method)]))
    return directive(kind, f'{name}{signature(node, src, is_method)}\n:module: {mod}', body, level)

def described_class(node, src, name, mod):
    "The description of class `node` in `src`, with its documented public methods"
    methods = {o.name: o for o in node.body if isinstance(o, ast.FunctionDef)}
    init = methods.get('__init__')
    parts = [linked(ast.get_docstring(node) or ''), docments_table(init, src, True) if init else '']
    parts += [described(o, src, f'{name}.{nm}', mod, 'method', 3) for nm,o in methods.items() if nm[0]!='_' and ast.get_docstring(o)]
    return directive('class', f"{name}{signature(init, src, True) if init else ''}\n:module: {mod}", '\n\n'.join(filter(None, parts)), 5)

def api_entry(node, src, mod):
    "The description of one top-level `node` of an exported cell"
    name = shown_name(node)
    if name is None: return None
    if isinstance(node, ast.ClassDef): return described_class(node, src, name, mod)
    if isinstance(node, ast.FunctionDef): return described(node, src, name, mod, 'method' if is_patch(node) else 'function')
    return directive('data', f'{name}\n:module: {mod}', '')

# Markdown

@lru_cache
def fastai_lookup(): return NbdevLookup(strip_libs='fastai')

def code_link(m):
    "A name in backticks as a link to its description here or in fastai's documentation, where it has one"
    name = m[1]
    if full := public_names().get(name): return f'{{py:obj}}`{name} <{full}>`'
    url = fastai_lookup().doc(name) if re.search('[A-Z_]', name) else None
    return f'[{m[0]}]({url})' if url else m[0]

def linked(md):
    "`md` with links behind the names in backticks, outside code blocks and headings"
    parts = re.split(r'(^(?:```|~~~).*?^(?:```|~~~)$|^#+ [^\n]*$)', md, flags=re.M|re.S)
    return ''.join(p if i%2 else re_code.sub(code_link, p) for i,p in enumerate(parts))

def pages():
    "Page in `_proc` by path in the repository"
    res = {'benchmarks/results/goals.md': 'benchmarks.md#goals', **{f'nbs/{p.name}': page_name(p) for p in notebooks()}}
    return {**res, **{f'docs/{p.name}': p.name for p in (root/'docs').glob('*.md')}, **papers}

def relinked(md, folder):
    "`md` from `folder` of the repository with its relative links leading to pages, or to copies of the files they name"
    def f(m):
        path = posixpath.normpath(posixpath.join(folder, m[2]))
        if path in pages(): return m[1]+pages()[path]
        if (root/path).is_file():
            (out/path).parent.mkdir(parents=True, exist_ok=True)
            copy(root/path, out/path)
            return m[1]+path
        return m[0]
    return re_link.sub(f, md)

def prose(md, folder): return linked(relinked(md, folder)).replace('<!-- stacked -->', '{.stacked}') # Wide tables that a phone shows row by row
def guide_page(md): return prose(filled(md).replace('\u00a0±', ' ±'), 'docs') # A phone may break a line there

# Pages

def md_cell(id, text): return dict(cell_type='markdown', id=id, metadata={}, source=text)

def exported_cell(c, mod):
    "The descriptions of what an exported cell defines, above its source; `None` for imports"
    src = source(c)
    nodes = ast.parse(src).body
    if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes): return None
    entries = list(filter(None, (api_entry(n, src, f'{lib}.{mod}') for n in nodes)))
    code = f'```python\n{src}\n```'
    return md_cell(c.id, '\n\n'.join([*entries, f':::{{dropdown}} Source\n{code}\n:::' if entries else code]))

def shown_size(c):
    "Metadata for the width at which a picture of cell `c` was meant; it is saved with more pixels"
    texts = (''.join(o.get('data', {}).get('text/plain', '')) for o in c.get('outputs', []))
    widths = [int(m[1]) for t in texts if (m := re.match(r'<Figure size (\d+)x', t))]
    return dict(mystnb=dict(image=dict(width=f'{max(widths)}px'))) if widths else {}

def page_cell(c, mod):
    "Cell `c` as the site shows it, or `None`"
    if 'hide' in c.directives or c.cell_type=='raw' or 'default_exp' in c.directives: return None
    if c.cell_type=='markdown': return md_cell(c.id, prose(source(c), 'nbs'))
    if is_export(c): return exported_cell(c, mod)
    return dict(c, source=source(c), id=c.id, metadata=shown_size(c))

def clean_dict(c): return {k: c[k] for k in ('cell_type', 'id', 'metadata', 'source', 'outputs', 'execution_count') if k in c}

def repository():
    "Address of the published repository, '' while there is none"
    cfg = ConfigParser(interpolation=None, delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT'].get('git_url', '').strip().rstrip('/').removesuffix('.git')

def colab_note(path, url):
    "A link that opens the notebook at `path` in Colab, nothing without an address on GitHub"
    if not (m := re.match(r'https://github\.com/([^/]+/[^/]+)$', url)): return ''
    link = f'https://colab.research.google.com/github/{m[1]}/blob/main/nbs/{path.name}'
    return f'[Open in Colab]({link}), where `%pip install git+{url}` comes first.'

def notebook_page(path, extra=(), above=''):
    "Write the page of the notebook at `path`, with the text `above` under its title"
    nb = read_nb(path)
    cells = [clean_dict(o) for c in nb.cells if (o := page_cell(c, module_name(nb)))]
    if above: cells.insert(1, md_cell('above', above))
    page = dict(cells=[*cells, *extra], metadata=nb.metadata, nbformat=nb.nbformat, nbformat_minor=nb.nbformat_minor)
    (out/page_name(path)).write_text(json.dumps(page), encoding='utf-8')

def toc_entry(p):
    "The side bar's line for the notebook, or page, at `p`; tutorials stand under a heading that calls them so"
    name = page_name(p).rsplit('.', 1)[0] if p.suffix=='.ipynb' else papers.get(p.name, p.name).removesuffix('.md')
    title = page_title(read_nb(p)) if p.suffix=='.ipynb' else ''
    if not title.startswith('Tutorial: '): return name
    title = title.removeprefix('Tutorial: ')
    return f'{title[0].upper()}{title[1:]} <{name}>'

def toctree(caption, paths):
    entries = '\n'.join(map(toc_entry, paths))
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```' if paths else ''

def summary(nb): return next((m[1] for c in nb.cells if (m := re.search(r'^> (.+)$', c.source, re.M))), '')

def name_row(name, about): return f"| `{name}` | {about.replace('|', chr(92)+'|')} |"

def module_table(path, folded=False):
    "The section of the API overview on the notebook at `path`; `folded` hides its table until somebody opens it"
    nb = read_nb(path)
    nodes = [n for c in nb.cells if is_export(c) for n in ast.parse(source(c)).body]
    rows = [name_row(shown_name(n), ast.get_docstring(n) or '') for n in nodes if isinstance(n, defs) and shown_name(n)]
    head = f"### [{module_name(nb)}]({page_name(path)})\n\n{summary(nb)}\n\n"
    table = linked('{.docments}\n| Name | What it does |\n|---|---|\n' + '\n'.join(rows)) if rows else ''
    return head + (f':::{{dropdown}} {len(rows)} names\n{table}\n:::' if folded and rows else table)

@lru_cache
def described_names():
    "Docstring by public name, for every function and class of every notebook"
    nodes = (n for p in rooms() for c in read_nb(p).cells if is_export(c) for n in ast.parse(source(c)).body)
    return {shown_name(n): ast.get_docstring(n) or '' for n in nodes if isinstance(n, defs) and shown_name(n)}

def main_table():
    "What people ask for first"
    rows = [name_row(nm, about) for nm in main_names if (about := described_names().get(nm))]
    return linked('{.docments}\n| Name | What it does |\n|---|---|\n' + '\n'.join(rows))

def api_page():
    intro = f'# API at a glance\n\n`from {lib}.all import *` brings what notebooks usually need. These come first:\n\n{main_table()}'
    rest = 'All public names follow, by module. Each heading leads to the notebook that defines, explains and tests its module.'
    parts = [f'## {k}\n\n'+'\n\n'.join(module_table(p, k=='Inside') for p in ps) for k,ps in kinds().items()]
    (out/'api.md').write_text('\n\n'.join([intro, rest, *parts])+'\n', encoding='utf-8')

def entry(name, title, about): return f"- [{title}]({name.rsplit('.', 1)[0]}.html)" + (f': {about}' if about else '')

def lead(p):
    "Title and first paragraph of the Markdown file `p`, links and comments taken out"
    title,first,*_ = [o.strip() for o in p.read_text(encoding='utf-8').split('\n\n')]
    return title.lstrip('# '), re.sub(r'\[(.+?)\]\(.+?\)|<!--.*?-->', r'\1', ' '.join(first.split()))

def page_title(nb): return next(m[1] for c in nb.cells if (m := re.search(r'^# (.+)$', c.source, re.M)))

def llms_txt():
    "The site for a language model: what the package is and what each page holds"
    index = read_nb(root/'nbs/index.ipynb')
    about = next(c.source for c in index.cells[1:] if c.cell_type=='markdown' and not c.source.startswith('[!')) # Not the badges
    line = lambda p,title: entry(page_name(p), title(nb := read_nb(p)), summary(nb))
    api = [line(p, lambda nb: f'{lib}.{module_name(nb)}') for ps in kinds().values() for p in ps]
    parts = dict(Guides=[entry(p.name, *lead(p)) for p in guides()], Tutorials=[line(p, page_title) for p in stories()],
        API=[entry('api.md', 'API at a glance', 'every public name with one line'), *api],
        Optional=[entry(name, Path(name).stem.capitalize(), '') for name in papers.values()])
    return '\n\n'.join([f'# {lib}', f'> {summary(index)}', about, *(f'## {k}\n\n'+'\n'.join(v) for k,v in parts.items())])+'\n'

def site_pages():
    "Write all pages, afresh"
    rmtree(out, ignore_errors=True)
    out.mkdir()
    for p in rooms(): notebook_page(p)
    for p in stories(): notebook_page(p, above=colab_note(p, repository()))
    for p in guides(): (out/p.name).write_text(guide_page(p.read_text(encoding='utf-8')), encoding='utf-8')
    for p,name in papers.items(): (out/name).write_text(prose((root/p).read_text(encoding='utf-8'), '.'), encoding='utf-8')
    api_page()
    (out/'llms.txt').write_text(llms_txt(), encoding='utf-8')
    start,*others = guides()
    trees = dict(Begin=[start], Tutorials=stories(), Guides=others, API=[out/'api.md', *kinds()['Optimizers'], *kinds()['Look and compare']],
        Inside=kinds()['Inside'], Project=map(Path, papers))
    notebook_page(root/'nbs/index.ipynb', [md_cell('toctrees', '\n\n'.join(toctree(k, list(v)) for k,v in trees.items()))])

if __name__=='__main__': site_pages()
