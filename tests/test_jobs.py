"Ten typical jobs, written as the guides say: each predicts better than a constant, gives no cause for a warning, and comes back from a file"
import sys,warnings

import pytest,torch,torch.nn.functional as F
from fastai.learner import load_learner
from fastai.torch_core import set_seed
import jobs

BETTER = 0.7 # Largest part of the best constant's validation loss; what was seen stands beside `JOBS`
SAME = 1e-5 # Largest difference between a model's predictions and those of its copy from a file, relative to the largest

# Parts of the constant's loss that were seen: images .04, transfer .00, multi_label .12, unet .14, table .25, collab .06, text .34,
# regression .11, timm_model .00, transformers_model .00
JOBS = 'images transfer multi_label unet table collab text regression timm_model transformers_model'.split()
NEEDS = dict(timm_model='timm', transformers_model='transformers')

@pytest.fixture
def ours(monkeypatch):
    "Texts of the warnings that the package itself gives"
    said,warn = [],warnings.warn
    def noted(message, *args, **kwargs):
        if sys._getframe(1).f_globals['__name__'].startswith('adahessian_fastai'): said.append(str(message))
        return warn(message, *args, **kwargs)
    monkeypatch.setattr(warnings, 'warn', noted)
    return said

def constant_loss(y):
    "Loss of the best constant prediction of targets: labels, masks, several labels of 0 and 1, or numbers"
    if not y.is_floating_point():
        share = torch.bincount(y.flatten())/y.numel()
        return -share[share>0].mul(share[share>0].log()).sum().item()
    if set(y.unique().tolist())<={0,1}: return F.binary_cross_entropy(y.mean(0).expand_as(y), y).item()
    return (y-y.mean(0)).square().mean().item()

@pytest.mark.parametrize('name', JOBS)
def test_job(name, tmp_path, ours):
    if name in NEEDS: pytest.importorskip(NEEDS[name])
    set_seed(0)
    learn = getattr(jobs, name)(tmp_path)
    with learn.no_bar(),learn.no_logging():
        loss,(preds,y) = learn.validate()[0],learn.get_preds()
        assert loss < BETTER*constant_loss(torch.as_tensor(y))
        assert learn.opt.n_estimates>=20 and not learn.opt.n_skipped and not ours
        learn.export('job.pkl')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # fastai says that a pickle may be harmful
            copy = load_learner(tmp_path/'job.pkl')
        again = copy.get_preds(dl=learn.dls.valid)[0]
    assert (again-preds).abs().max() <= SAME*preds.abs().max()
