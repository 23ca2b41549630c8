"Help for the person in front of it: comments beside parameters become part of `__doc__`, optimizers say what they are"
import difflib,inspect,re
from functools import partial
from itertools import groupby
from linecache import getlines
from textwrap import wrap

_re_param = re.compile(r'\s*(?:def \w+\()?\s*(\*{0,2}[a-zA-Z_]\w*)\s*[:=,)]?.*?\s#\s+(.*)')
_lib,_width = __package__,88 # What JupyterLab shows unbroken on a small screen

# Notes of parameters

def signature_lines(f): # Lines from `def` to the end of its signature
    "The signature of `f` as it is written"
    code = inspect.unwrap(f).__code__
    lines = getlines(code.co_filename)[code.co_firstlineno-1:]
    start = next((i for i,l in enumerate(lines) if re.match(r'\s*(async )?def ', l)), None)
    if start is None: return []
    head = lines[start].split('#')[0]
    if head.count('(')<=head.count(')'): return [lines[start]]
    end = next((i for i in range(start+1, len(lines)) if re.match(r'\s*\)', lines[i])), start)
    return lines[start:end+1]

def parameter_notes(f)->dict: # Comments by parameter; 'returns' for the one behind the closing parenthesis
    "The comments of the parameters of `f`"
    to,notes = getattr(f, '__delwrap__', None),{}
    for l in signature_lines(f):
        if m := re.match(r'.*\)(?:->.*?)?:.*?\s#\s+(.*)', l): notes['returns'] = m[1].strip()
        elif m := _re_param.match(l): notes[m[1]] = m[2].strip()
    more = parameter_notes(to.__init__ if inspect.isclass(to) else to) if to else {} # Arguments that `delegates` hands on
    takes,flat = inspect.signature(f).parameters,getattr(f, '__flat__', {}) # Settings of objects, by their flat keywords
    more = {k: v for k,v in more.items() if k in takes} | {k: parameter_notes(cls.__init__)[own] for k,(cls,own) in flat.items()}
    return {**notes, **{k: v for k,v in more.items() if k not in notes}}

def notes_text(notes:dict)->str:
    "`notes` as a list of at most 88 columns"
    n = max(map(len, notes))+4
    def entry(k, v): return f'  {k}'.ljust(n) + f'\n{" "*n}'.join(wrap(v, _width-n, break_on_hyphens=False))
    return '\n'.join(entry(k, v) for k,v in notes.items())

def add_notes(f):
    "Put the notes of the parameters of `f` under its docstring"
    doc = f.__doc__
    if '\n' in (doc or '') or doc is None and f.__name__!='__init__' or not (notes := parameter_notes(f)): return
    f.__doc__ = f"{f'{doc}{chr(10)*2}' if doc else ''}Parameters:\n{notes_text(notes)}"

def functions_of(o)->list: # `o` itself, or its public methods
    "What a person may ask about in `o`"
    if inspect.isfunction(o): return [o]
    return [f for nm,f in vars(o).items() if inspect.isfunction(f) and (nm[0]!='_' or nm=='__init__')] if inspect.isclass(o) else []

def add_all_notes(
    names:dict, # Objects by public name, as `vars` of a module has them
    *patched, # Classes of other packages whose methods from here have notes too
):
    "Put notes into `__doc__` for all that `names` hold of this package, and remember what makes optimizers"
    own = [o for nm,o in names.items() if nm[0]!='_']
    own += [f for c in patched for f in vars(c).values()]
    mine = [o for o in own if (getattr(o, '__module__', None) or '').startswith(f'{_lib}.')]
    makers[:] = [o for o in mine if getattr(o, '__name__', '') in ('adahessian','sophia','sassha','hessian_free')]
    for f in {id(f): f for o in mine for f in functions_of(o)}.values(): add_notes(f)

# Names that are not there

_renamed = dict(betas='mom and sqr_mom', beta1='mom', beta2='sqr_mom', momentum='mom', weight_decay='wd', weight_decouple='decouple_wd',
    learning_rate='lr', update_period='update_each', hessian_update_interval='update_each', num_samples='n_samples', max_iter='cg_max_iter',
    hessian_distribution='probe', avg_conv_kernel='average_kernels', average_conv_kernel='average_kernels',
    hvp="curvature='hessian' or curvature=Hessian('forward'), say", seed='torch.manual_seed before the optimizer is made')

makers = [] # Functions that make optimizers, once `adahessian_fastai.all` is there

def _keywords(f): return [k for k,p in inspect.signature(f).parameters.items() if p.kind is not p.VAR_KEYWORD]

def check_names(
    f, # Function that makes an optimizer
    given, # Names of keywords; raises `TypeError` if `f` does not have one
):
    "Answer an argument that `f` lacks with the name that it has here, or with the optimizers that have it"
    takes = _keywords(f)
    for k in [k for k in given if k not in takes]:
        owners = [o.__name__ for o in makers if k in _keywords(o)]
        near = _renamed.get(k) or ' '.join([] if owners else difflib.get_close_matches(k, takes, 1))
        if near.split(' ')[0].isidentifier() and near.split(' ')[0] not in takes: near = '' # Neither does this optimizer have
        said = f': use {near}' if near else f", which is for {' and '.join(owners)}" if owners else ''
        raise TypeError(f"{f.__name__} has no argument {k!r}{said}")

class Elsewhere:
    "A setting that is set another `way`, where an attribute of its name would do nothing"
    def __init__(self, name, way): self.name,self.way = name,way
    def __get__(self, o, cls=None): raise AttributeError(self.name)
    def __set__(self, o, v): raise AttributeError(f"{self.name} is no attribute of this optimizer, got {self.name}={v!r}: {self.way}")

elsewhere = dict.fromkeys('signed block_length average_kernels signed_blocks decouple_wd curvature hvp probe budget'.split(),
    'make an optimizer with it')
elsewhere |= {k: f'call `opt.set_hyper({k!r}, ...)`' for k in 'lr mom sqr_mom eps wd hessian_power clip cap spike'.split()}
elsewhere |= dict(n_samples='set `opt.estimator.n_samples`', along='set `opt.perturb.along`',
    rho="set `opt.perturb.rho`, or in sophia call `opt.set_hyper('rho', ...)`")

# What an object is

def arguments(o)->dict: # Those that differ from their defaults
    "What `o` was made with"
    of,own = (o.func,o.keywords) if isinstance(o, partial) else (type(o),vars(o))
    if own.get('probes', 1)!=1: own = {**own, 'dense': (own['dense'],own['probes'])} # Two attributes of one argument of `Every`
    kept = {p.name: (own[p.name],p.default) for p in inspect.signature(of).parameters.values() if own.get(p.name) is not None}
    return {k: v for k,(v,default) in kept.items() if v is not default and v!=default}

def shown(o)->str:
    "`o` in a few letters"
    if isinstance(o, float): return f'{o:.4g}'
    if hasattr(o, '__name__'): return o.__name__
    own = isinstance(o, partial) or type(o).__repr__ is shown or type(o).__module__.startswith(_lib)
    if not own: return repr(o)
    return f"{getattr(o, 'func', type(o)).__name__}({', '.join(f'{k}={shown(v)}' for k,v in arguments(o).items())})"

def described_groups(opt)->list: # A line for all groups with the same hyperparameters that follow one another
    "Parameters and hyperparameters of the groups of `opt`"
    def hypers(i): return ', '.join(f'{k}={shown(v)}' for k,v in opt.hypers[i].items())
    def line(idxs, text):
        ps = [p for i in idxs for p in opt.param_lists[i]]
        name = f'group {idxs[0]}' if len(idxs)==1 else f'groups {idxs[0]} to {idxs[-1]}'
        free = sum(p.numel() for p in ps if p.requires_grad)
        return f"{name}: {len(ps)} tensors, {free:,} of {sum(p.numel() for p in ps):,} weights train; {text}"
    return [line(list(idxs), text) for text,idxs in groupby(range(len(opt.param_lists)), hypers)]

def describe(opt)->str: # Name and steppers, estimator, schedule, groups
    "What `opt` is, in a few lines"
    inner = getattr(opt, 'opt', None)
    cbs = [getattr(cb, 'func', cb).__name__ for cb in getattr(inner, 'cbs', ())]
    name = getattr(inner, 'name', cbs[-1].removesuffix('_step') if cbs else type(opt).__name__)
    parts = {k: vars(opt)[k] for k in ('estimator','when','smooth','debiased','perturb','n_acc','curvature') if k in vars(opt)}
    settings = {k: vars(opt).get(k) for k in ('cg','damping','line_search','preconditioner','batches')}
    told = {'line_search'} if vars(opt).get('line_search', 1) is None else set() # It is there by default, and a preconditioner is not
    parts.update({k: v for k,v in settings.items() if k in told or v is not None and (arguments(v) or k=='preconditioner')})
    usual = dict(perturb=lambda v: not v.rho, n_acc=lambda v: v==1, debiased=lambda v: not v,
        smooth=lambda v: isinstance(v, partial) and not arguments(v))
    parts = {k: v for k,v in parts.items() if not (k in usual and usual[k](v))}
    head = f"{name}: {', '.join(cbs)}" if cbs else name
    return '\n  '.join([head, *(f'{k}: {shown(v)}' for k,v in parts.items()), *described_groups(opt)])
