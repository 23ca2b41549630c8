"Attention and recurrent layers: differentiable on the steps that need it, fast on the others, and equal to a plain float64 loop"
import pytest,torch
import torch.nn.functional as F
from fastai.callback.rnn import ModelResetter,RNNCallback,RNNRegularizer
from fastai.losses import CrossEntropyLossFlat
from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_clas_config,awd_lstm_lm_config
from fastai.text.models.core import SentenceEncoder,get_language_model,get_text_classifier
from torch import nn
from torch.nn.attention import SDPBackend,sdpa_kernel
from adahessian_fastai.hvp import graph_nodes
from helpers_learner import ROUNDING,Noted,data,distance,fit,given,learner,plain,split


class Encoder(nn.Module):
    def __init__(self, dropout=0.):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, activation='gelu', batch_first=True)
        self.body,self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),nn.Linear(8,3)
    def forward(self, x): return self.head(self.body(x).mean(1))


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Transformer(8, 2, 1, 1, 12, 0., batch_first=True),nn.Linear(8,3)
    def forward(self, x): return self.head(self.body(x, x[:,:3]).mean(1))


class MultiHead(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.body,self.head,self.kwargs = nn.MultiheadAttention(8, 2, batch_first=True),nn.Linear(8,3),kwargs
    def forward(self, x): return self.head(self.body(x, x, x, **self.kwargs)[0].mean(1))


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv,self.head = nn.Linear(8,24),nn.Linear(8,3)
    def forward(self, x):
        q,k,v = self.qkv(x).unflatten(-1, (3,2,4)).permute(2,0,3,1,4)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1,2).flatten(2).mean(1))


MODELS = dict(encoder=Encoder, encoder_with_dropout=lambda: Encoder(0.1), transformer=Translator, multihead=MultiHead,
    multihead_without_weights=lambda: MultiHead(need_weights=False), causal=Causal)

def made(kind, seed=0):
    torch.manual_seed(seed)
    return MODELS[kind]().double()


@pytest.mark.parametrize('update_each', [1,2])
@pytest.mark.parametrize('kind', MODELS)
def test_attention_equals_the_plain_loop(kind, update_each):
    x,y = data(24, (5,8))
    learn = fit(learner(made(kind), x, y, probe=given(), update_each=update_each))
    with sdpa_kernel(SDPBackend.MATH): want = plain(made(kind), [[b] for b in split(x,y,6)], update_each=update_each)
    assert distance(want, made(kind))>1e-2
    assert distance(learn.model, want)<ROUNDING


def test_the_fast_kernel_stays_on_the_other_steps():
    x,y = data(24, (5,8))
    fused = Noted('after_loss', lambda l: any('Flash' in type(o).__name__ for o in graph_nodes(l.loss_grad)))
    fit(learner(made('causal'), x, y, update_each=3, cbs=[fused]))
    assert fused.notes==[False,True,True,False]


@pytest.mark.parametrize('where', ['train','after'])
def test_validation_and_later_code_keep_the_fast_kernel(where):
    seen = []
    class Seen(Noted): run_valid,run_train = True,False
    x,y = data(12, (5,8))
    if where=='train': fit(learner(made('causal'), x, y, cbs=[Seen('after_pred', lambda l: seen.append(torch.backends.cuda.flash_sdp_enabled()))]))
    else:
        fit(learner(made('causal'), x, y))
        seen.append(torch.backends.cuda.flash_sdp_enabled())
    assert seen==[True]


def test_vision_transformer_of_timm():
    timm = pytest.importorskip('timm')
    def vit():
        torch.manual_seed(0)
        kwargs = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, num_classes=3)
        return timm.models.VisionTransformer(**kwargs).double()
    x,y = data(24, (1,8,8))
    learn = fit(learner(vit(), x, y, probe=given()))
    assert learn.model.blocks[0].attn.fused_attn
    with sdpa_kernel(SDPBackend.MATH): want = plain(vit(), [[b] for b in split(x,y,6)])
    assert distance(learn.model, want)<ROUNDING


class Recurrent(nn.Module):
    def __init__(self, layer, **kwargs):
        super().__init__()
        self.body,self.head = layer(4, 5, batch_first=True, **kwargs),nn.Linear(5,3)
    def forward(self, x): return self.head(self.body(x)[0][:,-1])


@pytest.mark.parametrize('layer,kwargs', [(nn.LSTM,{}), (nn.GRU,{}), (nn.RNN,{}), (nn.LSTM,dict(num_layers=2, dropout=0.2))])
def test_recurrent_layers_equal_the_plain_loop(layer, kwargs):
    def model():
        torch.manual_seed(0)
        return Recurrent(layer, **kwargs).double()
    x,y = data(24, (6,4))
    cudnn = Noted('after_pred', lambda l: torch.backends.cudnn.enabled)
    learn = fit(learner(model(), x, y, probe=given(), update_each=2, cbs=[cudnn]))
    want = plain(model(), [[b] for b in split(x,y,6)], update_each=2)
    assert cudnn.notes==[False,True,False,True] and torch.backends.cudnn.enabled
    assert distance(want, model())>1e-2
    assert distance(learn.model, want)<ROUNDING


def test_cudnn_stays_on_for_a_model_without_recurrent_layers():
    x,y = data(12, (5,8))
    cudnn = Noted('after_pred', lambda l: torch.backends.cudnn.enabled)
    fit(learner(made('causal'), x, y, cbs=[cudnn]))
    assert cudnn.notes==[True,True]


ALPHA,BETA,VOCAB = 2.,1.,11
small = dict(emb_sz=6, n_hid=7, n_layers=2, pad_token=1)

def words(n=24, length=8, seed=3):
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(2, VOCAB, (n,length+1), generator=g)
    return text[:,:-1],text[:,1:]


def regularized(pred, y):
    out,raw,dropped = [o[-1] if isinstance(o,list) else o for o in pred]
    loss = CrossEntropyLossFlat()(out, y) + ALPHA*dropped.float().pow(2).mean()
    return loss + BETA*(raw[:,1:]-raw[:,:-1]).float().pow(2).mean()


@pytest.mark.parametrize('kind', ['language model','classifier'])
def test_awd_lstm_with_its_callbacks_equals_the_plain_loop(kind):
    "Weight dropout, a hidden state from batch to batch, tied weights, and both regularizers"
    def model():
        torch.manual_seed(0)
        if kind=='language model': return get_language_model(AWD_LSTM, VOCAB, config={**awd_lstm_lm_config, **small}).double()
        config = {**awd_lstm_clas_config, **small}
        return get_text_classifier(AWD_LSTM, VOCAB, 3, seq_len=4, config=config, lin_ftrs=[5], max_len=8).double()
    x,y = words()
    if kind=='classifier': y = y[:,0]%3
    cbs = [ModelResetter(), RNNCallback(), RNNRegularizer(alpha=ALPHA, beta=BETA)]
    learn = fit(learner(model(), x, y, loss_func=CrossEntropyLossFlat(), probe=given(), cbs=cbs))
    want = model()
    want.reset()
    plain(want, [[b] for b in split(x,y,6)], loss_func=regularized)
    assert distance(want, model())>1e-2
    assert distance(learn.model, want)<ROUNDING


@pytest.mark.cuda
@pytest.mark.parametrize('kind', ['lstm','gru','encoder','causal'])
def test_on_a_gpu(kind):
    "cuDNN and the fused kernels of the GPU, with an estimate on every second step, against the plain loop on the CPU"
    def model():
        torch.manual_seed(0)
        return Recurrent(nn.LSTM if kind=='lstm' else nn.GRU).double() if kind in ('lstm','gru') else made(kind)
    x,y = data(24, (6,4) if kind in ('lstm','gru') else (5,8))
    probe = given()
    on_gpu = lambda p,g: probe(p.cpu(), g).to(p.device)
    learn = fit(learner(model().cuda(), x.cuda(), y.cuda(), probe=on_gpu, update_each=2))
    with sdpa_kernel(SDPBackend.MATH): want = plain(model(), [[b] for b in split(x,y,6)], update_each=2)
    assert distance(learn.model.cpu(), want)<1e-8

def test_gauss_newton_along_the_forward_pass_sees_through_torchscript():
    "From its second or third call on, a scripted module drops tangents"
    def trained(**kwargs):
        torch.manual_seed(0)
        model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(5,4), nn.Tanh())), nn.Linear(4,3)).double()
        return fit(learner(model, *data(24), curvature='ggn', update_each=1, **kwargs), 3).model
    assert distance(trained(hvp='forward'), trained(hvp='reverse'))<1e-9


class Chunk(nn.Module):
    "What a `SentenceEncoder` calls on a few words of the texts that have begun, to which shorter ones join"
    def __init__(self):
        super().__init__()
        self.embed,self.rnn = nn.Embedding(9, 4),nn.LSTM(4, 5, batch_first=True)
    def reset(self): self.state = None
    def forward(self, x):
        more = self.state and tuple(F.pad(s, (0,0,0,len(x)-s.shape[1])) for s in self.state)
        out,self.state = self.rnn(self.embed(x), more)
        return out

class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder,self.head = SentenceEncoder(4, Chunk(), pad_idx=1),nn.Linear(5, 2)
    def forward(self, x):
        out,mask = self.encoder(x)
        return self.head(out[:,-1])

class Readings:
    def __init__(self): self.all = []

def texts():
    "Eight texts of 12 to 2 words behind their padding, the longest first, and their numbers"
    torch.manual_seed(0)
    x = torch.randint(2, 9, (8,12))
    for i,n in enumerate((12,9,8,6,4,4,3,2)): x[i,:12-n] = 1
    return x,torch.arange(8)

def test_rows_of_texts_are_read_in_their_order_and_with_the_longest():
    "fastai cuts the texts of a batch into pieces, and trusts that the longest come first and fill the first piece"
    seen,(x,y) = Readings(),texts()
    def loss_func(pred, i):
        seen.all.append((i.tolist(), pred.detach().clone()))
        return F.cross_entropy(pred, i%2)
    model = Texts().double()
    learn = learner(model, x, y, bs=8, loss_func=loss_func, hypers=dict(lr=0., wd=0.), hessian_bs=0.25)
    fit(learn, 12)
    full,drawn = model(x),[o for o in seen.all if len(o[0])==2]
    assert len(drawn)==12 and len({tuple(i) for i,_ in drawn})>2
    for i,pred in drawn: assert i==sorted(i) and i[0]==0 and torch.allclose(pred, full[i])
