"Every code example of the migration guide runs: what stands after the change always, what stands before it where that package is installed"
import re,warnings
from importlib import import_module
from pathlib import Path

import pytest,torch
from fastai.basics import CrossEntropyLossFlat,DataLoaders,Learner,OptimWrapper,nn,partial,set_seed
import adahessian_fastai.all as ours

guide = Path(__file__).parents[1]/'docs/migration.md'
pytestmark = pytest.mark.skipif(not guide.exists(), reason='the guides are part of the repository, not of the package')

def examples():
    "Title of the section, code before and code after of each example of the guide"
    for section in re.split(r'^## ', guide.read_text(), flags=re.M)[1:] if guide.exists() else ():
        title = section.splitlines()[0]
        for code in re.findall(r'```python\n(.*?)```', section, re.S):
            before,_,after = code.rpartition('# after') if '# after' in code else ('','',code)
            yield title,before,after.partition('\n')[2] if before else after

OTHERS = ('timm','torch_optimizer','pytorch_optimizer') # What of the packages named there can be installed
EXAMPLES = list(examples())
places = dict(ids=[f'{title} {i}' for i,(title,*_) in enumerate(EXAMPLES)])

class Rows(list): loss_func = CrossEntropyLossFlat()

def names():
    "What the examples take for granted: data, a model, and what a user has imported"
    set_seed(0)
    x = torch.randn(24, 4)
    ds = Rows(zip(x, (x[:,0]>0).long()))
    dls = DataLoaders.from_dsets(ds, ds, bs=8, device='cpu')
    model = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,2))
    return dict(vars(ours), torch=torch, dls=dls, loader=dls.train, model=model, params=list(model.parameters()), loss_func=CrossEntropyLossFlat(),
        Learner=Learner, CrossEntropyLossFlat=CrossEntropyLossFlat, partial=partial, OptimWrapper=OptimWrapper)

def trained(ns, start):
    "Train on with what an example has made, if it only made something; did the weights move?"
    opt,learn = ns.get('opt'),ns.get('learn')
    if learn is None and 'opt_func' in ns: learn = Learner(ns['dls'], ns['model'], ns['loss_func'], opt_func=ns['opt_func'])
    if learn is not None:
        with learn.no_bar(),learn.no_logging(): learn.fit(1)
    elif opt is not None and not opt.n_steps:
        xb,yb = ns['dls'].one_batch()
        if not opt.n_batches: opt.differentiate(ns['loss_func'](ns['model'](xb), yb))
        opt.step()
    return any((p-q).abs().max()>0 for p,q in zip(ns['model'].parameters(), start)) and all(p.isfinite().all() for p in ns['model'].parameters())

def test_the_guide_has_examples(): assert len(EXAMPLES)>=10 and sum(bool(before) for _,before,_ in EXAMPLES)>=8

@pytest.mark.parametrize('title,before,after', EXAMPLES, **places)
def test_after(title, before, after):
    ns = names()
    start = [p.detach().clone() for p in ns['model'].parameters()]
    ns['xb'],ns['yb'] = ns['dls'].one_batch()
    if 'opt =' not in after and 'opt.' in after: ns['opt'] = ours.adahessian(ns['params'])
    exec(after, ns)
    assert trained(ns, start)

@pytest.mark.filterwarnings('ignore:Using backward')
@pytest.mark.parametrize('title,before,after', EXAMPLES, **places)
def test_before(title, before, after):
    named = [o for o in OTHERS if re.search(rf'\b{o}\.', before)]
    if not named: pytest.skip('nothing to install')
    ns = {**names(), named[0]: pytest.importorskip(named[0])}
    if named[0]=='timm': import_module('timm.optim')
    exec(before, ns)
    if 'optimizer' not in ns: return
    xb,yb = ns['dls'].one_batch()
    ns['loss_func'](ns['model'](xb), yb).backward(create_graph=True)
    ns['optimizer'].step()
    for p in ns['params']: p.grad = None # the cycle of parameter and gradient

# What the guide says about others

def test_a_conv1d_after_a_linear_in_torch_optimizer():
    Theirs = pytest.importorskip('torch_optimizer').Adahessian
    class Net(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.lin,self.conv = nn.Linear(4, n),nn.Conv1d(1, 2, 3)
        def forward(self, x): return self.conv(self.lin(x)[:,None]).tanh().square().mean()
    def step(model, x=torch.randn(5,4)):
        opt = Theirs(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model(x).mean().backward(create_graph=True)
        try: opt.step()
        finally: model.zero_grad()
    with pytest.raises(RuntimeError, match='size of tensor'): step(Net(6))
    step(Net(3)) # The bias has as many entries as the kernel: it runs, with the curvature of the bias
    with pytest.raises(UnboundLocalError): step(nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh()), torch.randn(5,1,4))
    for n in (6,3): # Here both train
        opt = ours.adahessian_paper((m := Net(n)).parameters())
        opt.differentiate(m(torch.randn(5,4)))
        opt.step()
        assert all(m.get_parameter(k).isfinite().all() for k,_ in m.named_parameters())

def test_the_order_of_arguments_of_the_forum():
    with pytest.raises(ValueError, match=r'mom must be a number in \[0,1\)'): ours.adahessian(nn.Linear(2,1).parameters(), .15, 1, 32)
    assert ours.adahessian(nn.Linear(2,1).parameters(), .15, n_acc=1, block_length=32).n_acc==1
