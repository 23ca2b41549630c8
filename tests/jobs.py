"Ten typical jobs, written as the guides say, each on small synthetic data: a function of a folder, which returns a trained Learner"
from operator import getitem
import numpy as np,pandas as pd
from fastai.collab import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *
from adahessian_fastai.all import *

colors = dict(red=(200,40,40), green=(40,200,40), blue=(40,40,200))

def picture(kinds, rng, size=32):
    "A dark noisy picture with a square for each of `kinds`, the mask of all squares, and the middle of the last one in rows and columns"
    im,mask,at = rng.integers(0, 60, (size,size,3)).astype(np.uint8),np.zeros((size,size), np.uint8),(0,0)
    for k in kinds:
        at = rng.integers(1, size-13, 2)
        place = np.s_[at[0]:at[0]+12, at[1]:at[1]+12]
        im[place],mask[place] = colors[k],1
    return im,mask,(np.array(at)+6)/size

def pictures(path, n=160):
    "`n` pictures with one square each, named after its colour, and their masks in a folder beside them"
    rng = np.random.default_rng(0)
    for folder in ('images','masks'): (path/folder).mkdir()
    for i in range(n):
        kind = list(colors)[i%3]
        im,mask,_ = picture([kind], rng)
        PILImage.create(im).save(path/f'images/{kind}_{i}.png')
        PILMask.create(mask).save(path/f'masks/{kind}_{i}.png')
    return get_image_files(path/'images')

def color_of(name): return name.split('_')[0]
def mask_of(o): return o.parents[1]/'masks'/o.name

def pictures_dls(path): return ImageDataLoaders.from_name_func(path, pictures(path), color_of, bs=16, seed=0, num_workers=0)

def net(pretrained=False):
    "A small network where others name `resnet18`"
    convs = [ConvLayer(3, 16, stride=2), ConvLayer(16, 32, stride=2), ResBlock(1, 32, 32)]
    return nn.Sequential(*convs, AdaptiveAvgPool(), Flatten(), nn.Linear(32, 3))

def images(path):
    learn = Learner(pictures_dls(path), net(), metrics=accuracy, opt_func=adahessian)
    learn.fit_one_cycle(3)
    return learn

def transfer(path):
    "The body comes from another Learner and not from the internet"
    first = images(path)
    learn = vision_learner(first.dls, net, cut=-3, pretrained=False, metrics=accuracy, opt_func=adahessian)
    learn.model[0].load_state_dict(first.model[:-3].state_dict())
    learn.freeze()
    learn.fine_tune(4)
    return learn

def multi_label(path):
    rng,rows = np.random.default_rng(0),[]
    for i in range(240):
        kinds = [k for k in colors if rng.random()<.5]
        PILImage.create(picture(kinds, rng)[0]).save(path/f'{i}.png')
        rows.append((f'{i}.png', ' '.join(kinds), i>=192))
    df = pd.DataFrame(rows, columns=['fname','labels','is_valid'])
    dls = ImageDataLoaders.from_df(df, path, label_delim=' ', valid_col='is_valid', bs=16, num_workers=0)
    learn = vision_learner(dls, net, cut=-3, pretrained=False, metrics=accuracy_multi, opt_func=adahessian)
    learn.fit_one_cycle(5)
    return learn

def unet(path):
    dls = SegmentationDataLoaders.from_label_func(path, pictures(path), mask_of, codes=['ground','square'], bs=16, seed=0, num_workers=0)
    learn = unet_learner(dls, net, cut=-3, pretrained=False, metrics=Dice, opt_func=adahessian)
    learn.fit_one_cycle(6)
    return learn

def table(path):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=400), b=rng.normal(size=400), kind=rng.choice(['x','y','z'], 400)))
    df['y'] = np.where(df.a + df.kind.map(dict(x=-1., y=0., z=1.))>0, 'yes', 'no')
    dls = TabularDataLoaders.from_df(df, path, procs=[Categorify,FillMissing,Normalize], cat_names=['kind'], cont_names=['a','b'],
        y_names='y', y_block=CategoryBlock, bs=32)
    learn = tabular_learner(dls, layers=[50,20], metrics=accuracy, opt_func=adahessian)
    learn.fit_one_cycle(6)
    return learn

def collab(path):
    rng = np.random.default_rng(0)
    taste,kind = rng.normal(size=(30,2)),rng.normal(size=(40,2))
    df = pd.DataFrame([(f'u{i}', f'm{j}', 3+taste[i]@kind[j]) for i in range(30) for j in range(40)], columns=['user','item','rating'])
    dls = CollabDataLoaders.from_df(df, path=path, bs=64)
    learn = collab_learner(dls, n_factors=8, y_range=(-2,8), opt_func=adahessian)
    learn.fit_one_cycle(10)
    return learn

def text(path):
    rng = np.random.default_rng(0)
    words = dict(good='fine great lovely', bad='poor dull awful')
    def review(k): return ' '.join(rng.choice('the film was and with of a'.split()+words[k].split(), 12))
    df = pd.DataFrame([(review(k), k) for k in words for _ in range(120)], columns=['text','label'])
    dls = TextDataLoaders.from_df(df, path, text_col='text', label_col='label', seed=0, bs=16)
    config = {**awd_lstm_clas_config, 'emb_sz': 32, 'n_hid': 48, 'n_layers': 2}
    learn = text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, metrics=accuracy, opt_func=adahessian)
    learn.fit_one_cycle(4)
    return learn

def regression(path):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=400), b=rng.normal(size=400), kind=rng.choice(['x','y','z'], 400)))
    df['y'] = df.a*df.b + df.kind.map(dict(x=-1., y=0., z=1.))
    dls = TabularDataLoaders.from_df(df, path, procs=[Categorify,FillMissing,Normalize], cat_names=['kind'], cont_names=['a','b'],
        y_names='y', y_block=RegressionBlock(), bs=32)
    learn = tabular_learner(dls, layers=[50,20], metrics=rmse, opt_func=adahessian)
    learn.fit_one_cycle(8)
    return learn

def timm_model(path):
    learn = vision_learner(pictures_dls(path), 'test_vit', pretrained=False, metrics=accuracy, opt_func=adahessian)
    learn.fit_one_cycle(8)
    return learn

class Logits(nn.Module):
    "What a model of transformers returns holds more than fastai's losses take"
    def __init__(self, body):
        super().__init__()
        self.body = body
    def forward(self, x): return self.body(x).logits

def transformers_model(path):
    from transformers import BertConfig,BertForSequenceClassification
    x = torch.randint(1, 20, (320,8), generator=torch.Generator().manual_seed(0))
    tfms = [[partial(getitem, x)], [partial(getitem, (x[:,0]<11).long())]]
    dls = Datasets(range(320), tfms, splits=(range(256),range(256,320))).dataloaders(bs=32, path=path, num_workers=0)
    config = BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2)
    learn = Learner(dls, Logits(BertForSequenceClassification(config)), CrossEntropyLossFlat(), metrics=accuracy, opt_func=adahessian)
    learn.fit_one_cycle(6)
    return learn

if __name__=='__main__':
    import sys,tempfile
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as d: globals()[name](Path(d))
