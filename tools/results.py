"Tables and numbers of the documentation, made from the files in benchmarks/results"
import csv,math,re,shlex,statistics
from pathlib import Path

folder = Path(__file__).resolve().parents[1]/'benchmarks/results'
re_table = re.compile(r'^<!-- results: (.+?) -->$', re.M)
re_number = re.compile(r'([\d.]+)(<!-- (\w+)\.csv (.+?) -->)')

# Reading

def rows(name):
    "The rows of the file `name`.csv, none if there is no such file"
    path = folder/f'{name}.csv'
    if not path.exists(): return []
    with path.open(encoding='utf-8', newline='') as f: return list(csv.DictReader(f))

def num(s): return float(s) if s else math.nan
def nums(rs, k): return [num(r[k]) for r in rs]
def mean(vs): return statistics.fmean(vs) if vs else math.nan

def grouped(rs, *keys):
    "Rows by the values of `keys`, in the order of their first appearance"
    res = {}
    for r in rs: res.setdefault(tuple(r[k] for k in keys), []).append(r)
    return res

# Writing

def shown(v, digits=3): return '–' if math.isnan(v) else f'{v:.{digits}g}' if v<10**digits else f'{v:.0f}'

def mean_sd(vs):
    "Mean ± standard deviation, to the digits that the latter leaves, four at most"
    m,sd = mean(vs),statistics.stdev(vs) if len(vs)>1 else math.nan
    if math.isnan(sd): return shown(m)
    left,most = (-math.floor(math.log10(o)) for o in (sd if sd>1e-6*abs(m) else 0.01*abs(m) or 1., abs(m) or 1.))
    places = max(0, min(1+left, 3+most))
    return f'{m:.{places}f}\u00a0±\u00a0{sd:.{places}f}'

def table(head, body):
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return '\n'.join([line(head), line(['---']*len(head)), *map(line, body)]) if body else ''

def pivot(rs, row, col, val, head):
    "Table of the column `val`, by `row` (a function of a row) downwards and the column `col` across"
    names,cells = list(dict.fromkeys(r[col] for r in rs)),{}
    for r in rs: cells.setdefault(row(r), {})[r[col]] = shown(num(r[val]))
    return table([head, *names], [[k, *(o.get(n, '') for n in names)] for k,o in cells.items()])

# The tables

def choose(rs, by):
    "Rows at the learning rate with the lowest `by` at the first seed"
    seed = min((r['seed'] for r in rs), key=int)
    score = lambda r: math.inf if math.isnan(v := num(r[by])) else v
    lr = min((r for r in rs if r['seed']==seed), key=score)['lr']
    return [r for r in rs if r['lr']==lr]

def training(name):
    "Each entry of training_`name`.csv at its best learning rate"
    rs = rows(f'training_{name}')
    if not rs: return ''
    by = 'valid_loss' if 'valid_loss' in rs[0] else 'loss'
    metrics = [k for k in ('loss', 'accuracy', 'chrf', 'bleu') if k in rs[0]]
    best = [choose(o, by) for o in grouped(rs, 'entry', 'epochs').values()]
    body = [[o[0]['entry'], shown(num(o[0]['lr'])), *(mean_sd(nums(o, k)) for k in metrics), o[0]['epochs'],
        shown(mean(nums(o, 'seconds'))), len(o)] for o in best]
    return table(['entry', 'lr', *metrics, 'epochs', 'seconds', 'seeds'], body)+where(rs)

def where(rs, k='machine'):
    "The machines of `rs` as a line under a table"
    names = dict.fromkeys(r[k].partition(', adahessian_fastai')[0] for r in rs if r.get(k))
    return f"\n\n{'; '.join(names)}." if names else ''

def forum():
    "Each optimizer of forum.csv"
    rs = rows('forum')
    body = [[k, shown(num(o[0]['lr'])), mean_sd([100*v for v in nums(o, 'accuracy')]), mean_sd(nums(o, 'loss')), mean_sd(nums(o, 'seconds')), len(o)]
        for (k,),o in grouped(rs, 'entry').items()]
    return table(['optimizer', 'lr', 'accuracy, %', 'loss', 'seconds', 'runs'], body)+where(rs)

def speed(val, name='speed'):
    "The column `val` of `name`.csv: an estimate, a mean over steps, or an optimizer without estimate"
    rs = [r for r in rows(name) if not math.isnan(num(r[val])) and r['kind']!='product' and not r['model'].startswith('step ')]
    rs = [r for r in rs if r['kind']!='other' or ' ' not in r['contender'] or 'torch' in r['contender']]
    name = lambda r: re.sub('^ours', 'adahessian', r['contender'])+(', no estimate' if (r['contender'],r['kind'])==('ours','other') else '')
    return pivot(rs, name, 'model', val, 'optimizer')

def scaling():
    "The cost of an estimate as the problem grows"
    rs = [r for r in rows('scaling') if r['kind']=='estimate']
    span = lambda o,k: ', '.join(shown(num(r[k])) for r in o)
    return table(['what grows', 'sizes', 'time of an estimate, × Adam'], [[k, span(o, 'n'), span(o, 'ratio')] for (k,),o in grouped(rs, 'scale').items()])

def autoencoder():
    "Error of the deep autoencoder at equal processor time"
    body = [[k, mean_sd(nums(o, 'half_time_error')), mean_sd(nums(o, 'error')), shown(mean(nums(o, 'epochs'))), len(o)]
        for (k,),o in grouped(rows('hessian_free_autoencoder'), 'optimizer').items()]
    return table(['optimizer', 'error at half time', 'error', 'epochs', 'seeds'], body)

def resnet20(name='resnet20'):
    "The last epoch of `name`.csv that all optimizers have reached"
    rs = rows(name)
    if not rs: return ''
    last = min(max(int(r['epoch']) for r in o) for o in grouped(rs, 'entry').values())
    on = {(r['entry'],r['seed']): r for r in rs if int(r['epoch'])==last}
    body = [[k, shown(num(o[0]['lr'])), mean_sd([100*v for v in nums(o, 'accuracy')]), mean_sd(nums(o, 'loss')), shown(mean(nums(o, 'seconds'))), len(o)]
        for (k,),o in grouped(on.values(), 'entry').items()]
    said = f"Epoch {last} of {rs[0]['epochs']}.\n\n"
    return said+table(['optimizer', 'lr', 'accuracy, %', 'loss', 'seconds', 'seeds'], body)+where(rs)

def shipped(*problems):
    "Loss of everything in shipped_….csv as it comes, Adam at its best rate, on the seeds of most entries; of one with fewer on its own"
    cells,head = dict(Adam={}, adahessian={}),[]
    for o in problems:
        rs = rows(f'shipped_{o}')
        of = {k: {r['seed'] for r in g} for k,g in grouped(rs, 'entry').items()}
        usual = sorted(map(len, of.values()))[len(of)//2] if of else 0
        seeds = set.intersection(*(o for o in of.values() if len(o)>=usual)) if of else set()
        groups = grouped([r for r in rs if r['seed'] in seeds], 'entry', 'lr')
        best = min((k for k in groups if k[0]=='Adam'), key=lambda k: mean(nums(groups[k], 'loss')), default=None)
        for k,g in groups.items():
            few = f' ({len(g)} of them)' if len(g)<len(seeds) else ''
            if k[0]!='Adam' or k==best: cells.setdefault(k[0], {})[o] = mean_sd(nums(g, 'loss'))+few
        head.append(f"{o}, {len(seeds)} seed{'s'*(len(seeds)!=1)}")
    return table(['loss', *head], [[k, *(c.get(o, '–') for o in problems)] for k,c in cells.items() if c])

def products(): return pivot(rows('hessian_free_products'), lambda r: r['product'], 'problem', 'gradients', 'product')

def plain(name):
    "The file `name`.csv as it is, numbers shortened"
    short = lambda s: shown(float(s)) if re.fullmatch(r'-?[\d.]+(e-?\d+)?', s) else f'`{s}`' if s[:1]=='{' else s
    rs = rows(name)
    return table([k.replace('_', ' ') for k in rs[0]], [map(short, r.values()) for r in rs]) if rs else ''

def text(name):
    "The Markdown file `name` without its title, its headings one level down"
    path = folder/name
    return re.sub('^#', '##', re.sub(r'\A# .*\n+', '', path.read_text(encoding='utf-8')), flags=re.M) if path.exists() else ''

tables = {f.__name__: f for f in (training, forum, speed, scaling, autoencoder, resnet20, shipped, products, plain, text)}

# Filling in

def value(m):
    "The number that the comment behind a number names: the mean of a column over the rows that match"
    *keys,col = shlex.split(m[4])
    match,(col,_,factor) = [k.partition('=')[::2] for k in keys],col.partition('*')
    vs = [num(r[col]) for r in rows(m[3]) if all(r[k]==v for k,v in match)]
    if not vs: raise ValueError(f"nothing in benchmarks/results fits {m[2]}")
    return f"{mean(vs)*float(factor or 1):.{len(m[1].partition('.')[2])}f}"

def renumbered(md): return re_number.sub(lambda m: value(m)+m[2], md)

def filled(md):
    "`md` with the tables that its comments ask for; a section whose files do not exist is left out"
    parts = re.split(r'^(?=## )', re_number.sub(value, md), flags=re.M)
    of = lambda m: tables[(args := shlex.split(m[1]))[0]](*args[1:])
    asks = lambda o: list(re_table.finditer(o))
    return ''.join(re_table.sub(of, o) for o in parts if not asks(o) or any(of(m) for m in asks(o)))
