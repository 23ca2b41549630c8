"A loss as a function of parameters: what a copy keeps, and means of several, by known answers"
import threading
import pytest,torch,torch.autograd.forward_ad as fwAD
from fastai.torch_core import TensorBase
from torch import nn
from adahessian_fastai.curvature import GaussNewton
from adahessian_fastai.ggn import NoOutputs
from adahessian_fastai.hvp import dual_thread,math_attention
from adahessian_fastai.problem import *


def bowl(scale=1., w=2., **kwargs):
    "`scale*w²` at `w`, which says whether it was evaluated for two derivatives"
    p = nn.Parameter(torch.tensor(w))
    return Problem([p], p**2*scale, outputs=p*1, evaluate=lambda twice=False: (p**2, f'{twice=}'), scale=scale, rescaled=lambda f: f, **kwargs)


def test_another_evaluation_has_no_scale():
    p = bowl(8.)
    for twice in (False,True):
        new = p.again(twice)
        assert (new.loss.item(),new.scale,new.outputs)==(4.,1.,f'{twice=}') and new.rescaled(3)==3 and new.rescaled is not p.rescaled
    assert (p.scale,p.loss.item())==(8.,32.)


def test_without_its_graph_a_problem_has_its_plain_loss():
    p = bowl(8.)
    new = p.without_graph()
    assert (new.loss.item(),new.scale,new.outputs,new.loss.requires_grad)==(4.,1.,None,False) and new.rescaled is not p.rescaled


def test_a_loss_may_be_a_vector_of_one_number(): assert Problem([], torch.ones(1)).loss.shape==(1,)


def test_backward_with_a_weight_and_without_gradients():
    p, = (b := bowl()).params
    b.backward(3., retain_graph=True)
    b.backward(.5)
    b.backward(.5, grads=[torch.tensor(2.)])
    b.backward(grads=[None])
    assert p.grad==3*4+.5*4+.5*2


def test_means_have_any_weights():
    ps = [bowl(count=1), bowl(w=3., count=3)]
    assert MeanProblem(ps).loss==4/4+9*3/4 and MeanProblem(ps, [2.,1.]).loss==2*4+9 and MeanProblem(ps, [0.,1.]).loss==9
    halved = MeanProblem(ps, [2.,1.], lambda ts: [t/2 for t in ts]).map(lambda p: p)
    assert halved.loss==(2*4+9)/2 and MeanProblem(iter(ps), iter([2.,1.])).loss==17 and halved.again(True).problems[0].outputs=='twice=True'
    with pytest.raises(ValueError, match='weights must be like the 2 problems'): MeanProblem(ps, [1.])
    with pytest.raises(ValueError, match='a mean needs items to count'): MeanProblem([bowl(count=0)])
    with pytest.raises(ValueError, match='a mean needs items to count'): MeanProblem([bowl(count=-1)])
    assert MeanProblem([bowl(count=0)], [1.]).loss==4


def test_the_loss_of_a_mean_is_a_plain_number_in_double_precision():
    loss = MeanProblem([Problem([], TensorBase(1.+2**-20)), Problem([], TensorBase(2**-30))], [1.,1.]).loss
    assert type(loss) is torch.Tensor and loss.item()==1+2**-20+2**-30


def test_gradients_of_a_mean_keep_their_graphs_where_asked():
    mean = MeanProblem([bowl(count=1)]*2)
    g, = mean.gradient(create_graph=True)
    assert g.item()==4 and torch.autograd.grad(g, mean.params)[0]==2
    assert mean.gradient(retain_graph=True)[0]==4==mean.gradient(retain_graph=True)[0]


def test_negative_counts_weigh_nothing(): assert weights_of([-1,1,3])==[0.,.25,.75] and weights_of([-1,1,3], 'sum')==[0.,1.,1.]


class Cell(nn.Module):
    def __init__(self, kind): self.kind = super().__init__() or kind
    def forward(self, x): return self.kind([x,None])

@pytest.mark.parametrize('kind', [tuple,list,lambda o: o[0]])
def test_the_first_output_is_the_state_and_hooks_go_after_an_error(kind):
    cell,x = Cell(kind),torch.ones(2)
    with pytest.raises(ZeroDivisionError), hidden_states([cell]) as hs: 1/(len(cell(x))*0)
    assert hs[0] is x and not cell._forward_hooks


def test_hidden_states_are_held_with_the_scale_and_weight_of_the_loss():
    "μλ is 3, and the state is 5w: the second derivative has 3·25·weight/count more"
    w,cell = nn.Parameter(torch.tensor(2.)),Cell(lambda o: o[0])
    def evaluate(twice=False): return w**2+0*cell(5*w),twice
    def problem(scale, **kwargs):
        with hidden_states([cell]) as hs: loss,_ = evaluate()
        return Problem([w], loss*scale, w*1, evaluate=evaluate, scale=scale, count=4, weight=2., **kwargs).replace(states=hs)
    def curvature(loss): return torch.autograd.grad(torch.autograd.grad(loss, w, create_graph=True)[0], w)[0].item()
    for reduction,count in (('mean',4),('sum',1)):
        held = with_states(problem(8.), 3., [cell], reduction)
        assert curvature(held.loss)==8*curvature(held.again().loss)==8*(2+3*25*2/count) and held.unseen=='structural damping'
        assert [held.again(o).outputs[0] for o in (False,True)]==[False,True]
    assert with_states(problem(1.).replace(outputs=None, states=[]), 3., [cell]).outputs is None
    with pytest.raises(NoOutputs, match='none of the modules'): with_states(problem(1.).replace(states=[]), 3., [cell])


def test_a_trial_that_ends_well_stays_where_it_is():
    p = torch.ones(2)
    trial = Trial(lambda: p.sum().item(), [p])
    with trial: assert trial(torch.ones(2), .5)==3. and trial(torch.ones(2), 1.)==4.
    assert trial.n_evals==2 and p.tolist()==[2.,2.]
    trial.restore()
    assert p.tolist()==[1.,1.]

def test_the_mean_gradient_of_problems_with_other_parameters_is_refused():
    a,b = (nn.Parameter(torch.tensor([o])) for o in (1.,2.))
    def loss(): return (a*10+b).sum()
    with pytest.raises(ValueError, match='same params'): MeanProblem([Problem([a,b], loss()),Problem([b,a], loss())]).gradient()
    assert [g.item() for g in MeanProblem([Problem([a,b], loss()),Problem([a,b], 3*loss())]).gradient()]==[20.,2.]

def test_gauss_newton_of_a_mean_of_graphs_alone():
    "Half of `2wx` for each, where the outputs are `wx` and the loss is their square"
    w = nn.Parameter(torch.tensor([1.,1.]))
    def one(x):
        z = w*x
        return Problem([w], (z**2).sum(), z)
    mean = MeanProblem([one(torch.tensor([1.,2.])),one(torch.tensor([3.,4.]))])
    assert GaussNewton()(mean, [w]).product([torch.ones(2)])[0].tolist()==[10.,20.]


def test_a_mean_over_processes_gets_memory_of_its_own():
    "The gradient of a sum is an expanded tensor, which nothing can be written into"
    p = nn.Parameter(torch.ones(3))
    def halve(ts): return [t.mul_(0.5) for t in ts]
    for n,want in ((1,3.), (2,3.)): assert MeanProblem([Problem([p], p.sum()**2) for _ in range(n)], reduce=halve).gradient()[0].tolist()==[want]*3


def test_an_empty_batch_is_no_part_of_a_mean():
    "Its loss is not a number, and 0 times that is none either"
    p = nn.Parameter(torch.tensor(2.))
    both = MeanProblem([Problem([p], p**2, count=4), Problem([p], p*torch.nan, count=0)])
    assert (both.loss.item(),[g.item() for g in both.gradient()],both.weights)==(4.,[4.],[1.])


def test_a_mean_in_half_precision_is_added_up_in_single():
    "256 and eight ones: bfloat16 has no 257, and adding it up there would leave 256"
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    g, = MeanProblem([Problem([p], p.sum()*c) for c in (256.,*[1.]*8)], [1.]*9).gradient()
    assert g.dtype==torch.bfloat16 and g.tolist()==[264.]*2


def test_the_others_of_a_loss_are_those_beside_the_parameters():
    p,o = (nn.Parameter(torch.ones(2)) for _ in range(2))
    assert Problem([p], (p*p).sum()).others()==[] and [id(t) for t in Problem([p], (p*o).sum()).others()]==[id(o)]


def test_a_trial_under_autocast_sees_the_moved_weights():
    "Autocast keeps copies of weights in half precision; the loss is the weight itself"
    w,x = nn.Parameter(torch.ones(1, 1)),torch.ones(1, 1)
    trial = Trial(lambda: nn.functional.linear(x, w).item(), [w])
    with torch.autocast('cpu', torch.bfloat16): assert [trial(torch.ones(1), a) for a in (0.,1.)]==[1.,2.]


def test_modes_end_with_an_error_but_for_dual_numbers_of_another_thread():
    def switch(thread):
        torch._C._set_grad_enabled(False)
        torch.overrides.BaseTorchFunctionMode().__enter__()
        math_attention.__enter__()
        dual_thread[:] = [thread]
        fwAD.enter_dual_level()
        1/0
    n = torch._C._len_torch_function_stack()
    for thread,level in ((threading.get_ident(),-1), (-1,0)):
        try:
            with pytest.raises(ZeroDivisionError), modes_kept(): switch(thread)
            assert torch.is_grad_enabled() and math_attention.held==0 and torch._C._len_torch_function_stack()==n and fwAD._current_level==level
        finally:
            while fwAD._current_level>=0: fwAD.exit_dual_level()
            dual_thread.clear()
