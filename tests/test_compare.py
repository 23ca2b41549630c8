"The command line, as a user calls it"
import subprocess,sys

import pandas as pd,pytest
from PIL import Image
from adahessian_fastai.compare import main


def call(*args): return subprocess.run([sys.executable,'-m','adahessian_fastai',*args], capture_output=True, text=True)


def test_exit_code_and_stream_of_the_command():
    res = call('--data','nowhere')
    assert (res.returncode,res.stdout)==(2,'') and res.stderr.count('\n')==1

WRONG = {'a missing folder': dict(data='nowhere'), 'an unknown optimizer': dict(opts='adam,newton'), 'an unknown arch': dict(arch='resnet17'),
    'no epochs': dict(epochs=0), 'a negative learning rate': dict(lr='-1'), 'no number': dict(lr='adam=much'), 'a file as out': dict(out=__file__),
    'an empty folder': dict(data='EMPTY')}

@pytest.mark.parametrize('what', WRONG)
def test_mistakes_get_one_line_and_exit_code_2(what, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    args = {k: str(tmp_path/'empty') if v=='EMPTY' else v for k,v in WRONG[what].items()}
    with pytest.raises(SystemExit, match='2'): main(**{'out': str(tmp_path/'res'), **args})
    out,err = capsys.readouterr()
    assert out=='' and err.startswith('adahessian-compare: ') and err.count('\n')==1
    assert not (tmp_path/'res').exists()


def test_a_folder_of_images_is_compared(tmp_path):
    for part in ('train','val'):
        for name,level in (('dark',40),('light',200)):
            folder = tmp_path/'images'/part/name
            folder.mkdir(parents=True)
            for i in range(6): Image.new('RGB', (20,20), (level+i,level,level-i)).save(folder/f'{i}.png')
    out = tmp_path/'res'
    res = call('--data', str(tmp_path/'images'), '--arch','xresnet18','--size','16','--bs','4','--epochs','1','--opts','sgd,adahessian','--out',str(out))
    assert res.returncode==0, res.stderr
    assert {o.name for o in out.iterdir()}=={'compare.csv','runs.csv','compare.png'}
    table = pd.read_csv(out/'compare.csv')
    assert list(table.optimizer)==['sgd','adahessian'] and table.ratio[0]==1
    assert {'valid_loss','accuracy','s/epoch','peak MB'}<=set(table.columns) and table['peak MB'].min()>1
