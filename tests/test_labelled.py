"What of the labelled data is not a lesson: run-length codes by another encoder, files of every kind, order under threads, hostile folders, real sets if there are any"
import json, os, warnings
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from densessl.core import InputError
from densessl.labelled import *
from densessl.labelled import _read_panoptic

RNG = np.random.default_rng(0)
IMAGES, MASKS = RNG.integers(0, 256, (12,9,14,3), dtype=np.uint8), RNG.integers(0, 4, (12,9,14), dtype=np.uint8)
NAMES = [f'{i:02}' for i in range(12)]

def save(folder, stack, names=NAMES, ext='png'):
    folder.mkdir(parents=True, exist_ok=True)
    for n,o in zip(names, stack): Image.fromarray(o).save(folder/f'{n}.{ext}')

def plain(root, n=8, masks=MASKS):
    "images/{train,val} and labels/{train,val}"
    for s,i in (('train', slice(n)), ('val', slice(n,12))):
        save(root/'images'/s, IMAGES[i], NAMES[i]); save(root/'labels'/s, masks[i], NAMES[i])
    return root

def quiet(*args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return labelled_data(*args, **kw)

# ---- COCO's codes

def runs_of(mask):
    "Run lengths of a mask, column by column, by a loop"
    out, now = [0], False
    for v in mask.T.flatten():
        if v!=now: out.append(0); now = v
        out[-1] += 1
    return out

def compress(counts):
    "The compressed text, from the description of the format: differences from the fourth on, five bits a character, low bits first"
    text = ''
    for i,c in enumerate(counts):
        x, more = c-counts[i-2] if i>2 else c, True
        while more:
            bits, x = x&31, x>>5
            more = x!=(-1 if bits&16 else 0)
            text += chr(48+bits+32*more)
    return text

@pytest.mark.parametrize('share', (0., .01, .3, .5, .99, 1.))
@pytest.mark.parametrize('hw', ((1,1), (1,70), (40,1), (33,57), (300,200)))
def test_run_lengths_come_back(hw, share):
    m = np.random.default_rng(1).random(hw)<share
    counts = runs_of(m)
    assert (decode_runs(counts, hw)==m).all()
    assert decode_counts(compress(counts))==counts and (decode_runs(compress(counts), hw)==m).all() and (decode_runs(compress(counts).encode(), hw)==m).all()

def test_polygon_moves_with_its_corners_and_lies_in_the_image():
    xy = np.array([3.3,2.1, 20.7,4.9, 14.2,17.6, 6.1,12.2])
    a = fill_polygon(xy, (40,50))
    b = fill_polygon(xy+np.tile([7,11], 4), (40,50))
    assert (b[11:,7:]==a[:-11,:-7]).all() and a.sum()==b.sum()
    area = .5*abs(sum(xy[2*i]*xy[(2*i+3)%8]-xy[(2*i+2)%8]*xy[2*i+1] for i in range(4)))
    assert abs(a.sum()-area)<.05*area
    out = fill_polygon([-10,-10, 100,-10, 100,100, -10,100], (4,6))
    assert out.all() and not fill_polygon([7,1, 9,1, 9,3], (4,6)).any() and not fill_polygon([1,1, 1,1], (4,6)).any()

@pytest.mark.parametrize('bytes_', (1, 3))
def test_panoptic_numbers_in_one_byte_or_three(tmp_path, bytes_):
    number = MASKS[0].astype(int)*(60 if bytes_==1 else 100000)
    png = number.astype(np.uint8) if bytes_==1 else np.stack([number//256**i%256 for i in range(3)], -1).astype(np.uint8)
    save(tmp_path/'images', IMAGES[:1]); save(tmp_path/'panoptic', [png])
    own = [dict(image_id=5, file_name='00.png', segments_info=[dict(id=int(n), category_id=7*int(c)) for n,c in zip(np.unique(number)[1:], (1,2,3))])]
    (tmp_path/'panoptic.json').write_text(json.dumps(dict(images=[dict(id=5, file_name='00.png', split='train')], categories=[dict(id=7*c, name=str(c)) for c in (3,1,2)], annotations=own)))
    layout, _, found = find_layout(tmp_path)
    assert layout=='coco-panoptic' and found.classes==('1','2','3') and found.table=={0: None, 7: 0, 14: 1, 21: 2}
    assert (_read_panoptic(found.splits['train'][0][1])==7*MASKS[0].astype(int)).all()

def test_small_instances_lie_on_large_ones_and_images_without_any_are_background(tmp_path):
    box = lambda x, s: [x,x, x+s,x, x+s,x+s, x,x+s]
    save(tmp_path/'images', IMAGES)
    anns = [dict(image_id=0, category_id=5, area=4, segmentation=[box(2,2)]), dict(image_id=0, category_id=9, area=64, segmentation=[box(1,4), box(5,4)]), dict(image_id=1, category_id=5, segmentation=[])]
    anns += [dict(image_id=3, category_id=9, area=1, segmentation=[box(0,2)])]
    (tmp_path/'instances.json').write_text(json.dumps(dict(categories=[dict(id=5, name='a'), dict(id=9, name='b')], annotations=anns, images=[dict(id=i, file_name=f'{n}.png', height=9, width=14) for i,n in enumerate(NAMES)])))
    train, test = quiet(tmp_path, (9,14))
    assert train.classes==('background','a','b') and len(train)==9 and len(test)==3
    m = train.masks[0]
    assert m[2,2]==1 and m[3,3]==1 and m[1,1]==2 and m[4,4]==2 and m[8,8]==2 and m[1,6]==0 and m[0,0]==0
    assert not train.masks[1].any() and test.masks[0][:2,:2].eq(2).all()

# ---- files

def test_reading_keeps_the_order_and_translates(tmp_path):
    files = quiet(plain(tmp_path/'set'), (9,14), load=False)[0]
    for n in (1, 3, 8, 50):
        X, M = map(torch.cat, zip(*files.batches(n)))
        assert (X.permute(0,2,3,1).numpy()==IMAGES[:8]).all() and (M.numpy()==MASKS[:8]).all()
    assert files[::-1].load().masks.flip(0).equal(files.load().masks) and files[::-1].name=='set-train[::-1]'

def test_reading_goes_only_two_batches_ahead(tmp_path):
    seen = []
    def spy(path, hw=None): seen.append(path); return read_mask(path)
    files = SegmentationFiles(quiet(plain(tmp_path), 9, load=False)[0].pairs, (9,14), {i: i for i in range(4)}, 4, read=spy)
    it = files.batches(2)
    next(it); it.close()
    assert len(seen)<=6

@pytest.mark.parametrize('mode,ext', (('L','jpg'), ('RGBA','png'), ('P','png'), ('CMYK','jpg'), ('RGB','webp'), ('1','png'), ('RGB','TIFF')))
def test_images_of_every_mode(tmp_path, mode, ext):
    plain(tmp_path)
    (tmp_path/'images/train/00.png').unlink()
    im = Image.fromarray(IMAGES[0]).convert(mode)
    im.save(tmp_path/f'images/train/00.{ext}')
    got = quiet(tmp_path, (9,14))[0].images[0]
    assert (got.permute(1,2,0).numpy()==np.array(Image.open(tmp_path/f'images/train/00.{ext}').convert('RGB'))).all()

def test_palettes_and_hidden_files(tmp_path):
    plain(tmp_path)
    for f in (tmp_path/'labels/train').iterdir():
        p = Image.open(f).convert('L'); q = Image.new('P', p.size); q.putpalette([7*i%256 for i in range(768)]); q.putdata(list(p.tobytes())); q.save(f)
    for s in ('train', 'val'): (tmp_path/f'images/{s}/.hidden.png').write_bytes(b'x'); (tmp_path/f'images/{s}/notes.txt').write_text('x')
    (tmp_path/'images/.cache').mkdir()
    assert (quiet(tmp_path, (9,14))[0].masks.numpy()==MASKS[:8]).all()

def test_sizes_of_images_and_masks(tmp_path):
    train, _ = quiet(plain(tmp_path), 28, mask_size=(18,28))
    assert train.sizes==((28,28),(18,28)) and (train.masks[:,::2,::2].numpy()==MASKS[:8]).all()

def test_images_are_averaged_when_they_shrink(tmp_path):
    "A board of black and white pixels becomes grey, not black or white"
    board = np.broadcast_to((np.indices((16,16)).sum(0)%2*255)[...,None], (16,16,3)).astype(np.uint8)
    for s in ('train', 'val'): save(tmp_path/f'images/{s}', [board]*2, 'ab'); save(tmp_path/f'labels/{s}', [MASKS[0][:8,:8].repeat(2,0).repeat(2,1)]*2, 'ab')
    x = quiet(tmp_path, 8)[0].images.float()
    assert (x[:,:,1:-1,1:-1]-127.5).abs().max()<20

def test_classes_by_list_by_name_and_by_looking(tmp_path):
    plain(tmp_path)
    train, test = quiet(tmp_path, 9)
    assert (train.n_classes, train.ignore_index, train.classes)==(4, 255, None)
    (tmp_path/'classes.txt').write_text('sky\nVOID\nroad\n\ntree\n')
    train, _ = quiet(tmp_path, (9,14))
    assert train.classes==('sky','road','tree') and (train.masks.numpy()==np.array([0,255,1,2])[MASKS[:8]]).all()
    (tmp_path/'classes.tsv').write_text('index\tname\n3\ttree\textra\n0\tsky\n1\troad\n2\trock\n')
    train, _ = quiet(tmp_path, (9,14), ignore_index=2)
    assert train.classes==('sky','road','rock','tree') and (train.masks.numpy()==np.array([0,1,255,3])[MASKS[:8]]).all()
    train, _ = quiet(tmp_path, (9,14), remap={0: 0, 1: 0, 2: 1, 3: None}, classes=('far','near'))
    assert train.classes==('far','near') and (train.masks.numpy()==np.array([0,0,1,255])[MASKS[:8]]).all()

def test_what_is_said_about_classes(tmp_path):
    m = MASKS.copy(); m[:8][m[:8]==3] = 0; m[m==1] = 0
    with pytest.warns(UserWarning) as said: labelled_data(plain(tmp_path/'set', masks=m), 9)
    assert [str(w.message) for w in said]==['1 of 4 classes occur in no mask of set-train and set-val and are left out of the mean (1)',
                                          '1 of 4 classes occur in set-val but not in set-train, so they count as 0 (3)']

def test_the_parts(tmp_path):
    plain(tmp_path/'set')
    (tmp_path/'set/images/val').rename(tmp_path/'set/images/test'); (tmp_path/'set/labels/val').rename(tmp_path/'set/labels/test')
    assert [d.name for d in quiet(tmp_path/'set', 9)]==['set-train', 'set-test']
    assert [d.name for d in quiet(tmp_path/'set', 9, splits=('test','train'))]==['set-test', 'set-train']
    few = quiet(tmp_path/'set', (9,14), limit=2)
    assert [(d.images.permute(0,2,3,1).numpy()==IMAGES[i]).all() for d,i in zip(few, ([0,4], [8,10]))]==[True, True]

# ---- hostile folders: one sentence that says what is wrong and where

HOSTILE = {
    'mask missing':     (lambda r: (r/'labels/val/09.png').unlink(), '1 of 4 files have no mask: 09; add them'),
    'no image':         (lambda r: [p.unlink() for p in (r/'images/val').iterdir()], 'no image in'),
    'another size':     (lambda r: Image.new('L', (14,8)).save(r/'labels/train/03.png'), '03.png is 14x8, its image 14x9: they must have the same size'),
    'colour mask':      (lambda r: Image.new('RGB', (14,9)).save(r/'labels/train/03.png'), '03.png has mode RGB'),
    'broken image':     (lambda r: (r/'images/train/03.png').write_bytes(b'x'), 'cannot read'),
    'cut mask':         (lambda r: (r/'labels/train/03.png').write_bytes((r/'labels/train/03.png').read_bytes()[:60]), 'cannot read'),
    'only ignored':     (lambda r: [Image.new('L', (14,9), 255).save(p) for p in (r/'labels/val').iterdir()], 'every pixel has the ignored label 255'),
    'all ignored':      (lambda r: [Image.new('L', (14,9), 255).save(p) for p in (r/'labels').glob('*/*')], 'every pixel has the ignored label 255'),
    'outside the list': (lambda r: (r/'classes.txt').write_text('a\nb\n'), 'which are no class of set-train: set n_classes or ignore_index, or pass remap'),
    'one split':        (lambda r: [(r/k/'val').rename(r/k/'other') for k in ('images','labels')], 'has no split val or test: it has other, train'),
    'labels elsewhere': (lambda r: (r/'labels').rename(r/'truth'), 'is not laid out as labelled data'),
    'split unlabelled': (lambda r: [p.unlink() for p in (r/'labels/val').iterdir()] and (r/'labels/val').rmdir(), 'is not a folder'),
    'bad list':         (lambda r: (r/'classes.tsv').write_text('sky road tree'), 'must hold a label, a tab and a name'),
    'bad json':         (lambda r: (r/'panoptic.json').write_text('['), 'cannot read'),
    'json of numbers':  (lambda r: (r/'panoptic.json').write_text('[1]'), 'is no COCO panoptic file'),
    'json without ids': (lambda r: (r/'instances.json').write_text('{"images": [{}], "annotations": [], "categories": []}'), 'is no COCO instances file'),
}
@pytest.mark.parametrize('what', HOSTILE)
def test_hostile_folders(tmp_path, what):
    spoil, said = HOSTILE[what]
    spoil(plain(tmp_path/'set'))
    with pytest.raises(InputError) as e: quiet(tmp_path/'set', 9)
    message = str(e.value)
    assert said in message and '\n' not in message and len(message)<1200

def test_not_a_folder(tmp_path):
    (tmp_path/'f').write_text('x')
    for p in (tmp_path/'f', tmp_path/'none', str(tmp_path/'none')):
        with pytest.raises(InputError, match='is not a folder'): labelled_data(p)
    (tmp_path/'empty').mkdir()
    with pytest.raises(InputError, match='it holds nothing'): labelled_data(tmp_path/'empty')

DATA = Path(os.environ.get('DENSESSL_TEST_DATA', 'none'))
@pytest.mark.skipif(not (DATA/'camvid_mini').is_dir(), reason='DENSESSL_TEST_DATA holds no camvid_mini')
def test_camvid_as_it_lies():
    train, test = labelled_data(DATA/'camvid_mini')
    assert (len(train), len(test), train.n_classes, train.ignore_index, train.classes[0], train.classes[-1])==(184, 51, 11, 255, 'Sky', 'Bicyclist')
    share = torch.cat([train.masks, test.masks]).flatten().bincount(minlength=256)[[3,255]]/(235*224*224)
    assert torch.allclose(share, torch.tensor([.293,.034]), atol=.03)

@pytest.mark.skipif(not (DATA/'coco_mini').is_dir(), reason='DENSESSL_TEST_DATA holds no coco_mini')
def test_coco_as_it_lies():
    "Its panoptic masks are its semantic masks; instances cover the things of the panoptic masks"
    train, test = quiet(DATA/'coco_mini')
    assert (len(train), len(test), train.n_classes)==(57, 47, 133)
    for im,mask in find_layout(DATA/'coco_mini')[2].splits['val2017'][:10]: assert (_read_panoptic(mask)==np.array(Image.open(DATA/'coco_mini/semantic'/mask.file.name))).all()
    things = quiet(DATA/'coco_mini', layout='coco-instances')
    assert [len(d) for d in things]==[167, 67] and things[0].n_classes==81
