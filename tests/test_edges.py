"Edge cases of optimizer, scale and schedule, each of which the change of a single line would break"
import math,pytest,torch,torch.nn.functional as F,warnings
from torch import nn
from adahessian_fastai.all import Problem,adahessian_paper as adahessian,sophia
from adahessian_fastai.optimizer import remedy,upgraded
from helpers_learner import data,fit,learner,mlp

def test_the_advice_names_the_largest_rate_and_the_bounds_that_are_off():
    a,b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([[a],[b]], lr=slice(0.1,0.2), clip=3)
    assert remedy(opt)=='take a smaller learning rate than lr=0.2, or bound the steps with cap=0.1, spike=2'

def test_a_step_with_nothing_to_do_says_nothing():
    "Without gradients, or with zeros, nobody went past `differentiate`"
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p], wd=0.)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt.step()
        opt.differentiate((p**4).sum())
        opt.step()
        p.grad.zero_()
        opt.step()
    assert opt.n_skipped==0

def test_gradients_past_an_optimizer_of_which_all_opted_out_are_welcome():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p])
    opt.opt_out(p)
    (p**4).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt.step()
    assert opt.n_steps==1 and (p<1).all()

def test_after_a_skipped_step_nothing_is_pending():
    "Also where the loop clears the gradients itself"
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p])
    opt.differentiate((p**4).sum()*math.inf)
    with pytest.warns(UserWarning, match='step skipped'): opt.step()
    p.grad = None
    opt.differentiate((p**4).sum())
    opt.step()
    assert opt.n_steps==opt.n_skipped==1 and (p<1).all()

def test_an_infinite_loss_with_a_finite_gradient_is_skipped():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p])
    opt.differentiate((p**4).sum()+math.inf)
    assert p.grad.isfinite().all()
    with pytest.warns(UserWarning, match='step skipped'): opt.step()
    assert p.tolist()==[1.,1.]

def test_a_loop_after_a_learner_asks_the_schedule_anew():
    "Of the Learner's last batch, which had no estimate, nothing is left"
    x,y = data(12)
    learn = fit(learner(mlp(), x, y, update_each=2))
    assert learn.opt.n_estimates==1
    learn.opt.differentiate(F.cross_entropy(learn.model(x), y))
    assert learn.opt.n_estimates==2 and len(learn.opt.diags)==6

def test_an_overflow_of_one_parameter_is_one_of_all():
    "It may hide behind finite numbers elsewhere: the scale falls, and no estimate is used"
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([p,q], probe=lambda o,_: torch.full_like(o, math.inf if o is p and opt.n_estimates else 1.))
    for _ in range(2):
        opt.zero_grad()
        opt.differentiate(((p**4).sum()+(q**4).sum())*1024, scale=1024.)
        for o in (p,q): o.grad.div_(1024)
        assert [d.isfinite().all().item() for d in opt.diags.values()]==[opt.n_estimates==1,True]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            opt.step()
    assert opt.curvature_scale.c==0.5 and opt.n_dropped==1 and all(opt.state[o]['hess_step']==1 for o in (p,q))

def test_drawn_labels_leave_the_scale_of_curvature_alone():
    "They have no second derivative that could overflow"
    x,y = data(12)
    model = mlp()
    opt = sophia(model.parameters(), dense=20)
    out = model(x)
    opt.differentiate(Problem(list(model.parameters()), F.cross_entropy(out, y)*1024, out, y, F.cross_entropy, scale=1024.))
    assert not opt.pending.scaled

def test_an_estimate_that_is_dropped_everywhere_has_no_noise():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p], n_samples=2, probe=lambda o,_: torch.full_like(o, math.inf))
    opt.differentiate((p**4).sum())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        opt.step()
    assert opt.n_dropped==1 and len(opt.noise_record)==0

def test_an_old_file_says_of_a_loss_that_was_not_finite_and_of_parameters_that_had_no_estimate():
    own = dict(seed=1, n_steps=5, n_estimates=5, n_dropped=0, n_skipped=0, n_batches=1, n_items=6, bad_loss=True)
    new = upgraded(dict(wrapper=own, state=[{},dict(hess_step=5, step=5)], hypers=[{}]))
    assert math.isnan(*new['curvature']['pending']['losses']) and new['state']==[{},dict(hess_step=5, step=5, age=5)]

def test_the_scale_of_curvature_goes_with_a_state():
    p = nn.Parameter(torch.ones(2))
    a,b = (adahessian([p]) for _ in range(2))
    a.curvature_scale.update(False)
    b.load_state_dict(a.state_dict())
    assert b.curvature_scale.c==0.5

def test_one_odd_parameter_among_others_opts_nothing_out():
    p,other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([p])
    with pytest.raises(ValueError, match='got 1 of 2 that are none'): opt.opt_out([p,other])
    assert 'do_hessian' not in opt.state[p]
