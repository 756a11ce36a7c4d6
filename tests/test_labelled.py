"What of the labelled data is not a lesson: run-length codes by another encoder, files of every kind, order under threads, hostile folders, real sets if there are any"
import json, os, warnings
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from densessl.ground.core import InputError
from densessl.data.labelled import *
from densessl.data.labelled import labelled_options
from densessl.data.coco import BACKGROUND, decode_counts, decode_runs, fill_polygon, read_panoptic
from densessl.data.photographs import read_photo
from densessl.evaluation.report import open_scoring_data, views_to_gather
from densessl.data.masks import color_label, read_mask
from densessl.data.public_sets import CITYSCAPES_CLASSES

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
    assert layout=='coco-panoptic' and found.classes==('1','2','3') and found.table=={BACKGROUND: None, 7: 0, 14: 1, 21: 2}
    assert (read_panoptic(found.splits['train'][0][1])==np.where(MASKS[0]==0, BACKGROUND, 7*MASKS[0].astype(int))).all()

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
    assert (got.permute(1,2,0).numpy()==np.array(read_photo(tmp_path/f'images/train/00.{ext}', 2**16)[0])).all()

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

def test_the_size_that_is_scored_is_an_option(tmp_path):
    plain(tmp_path)
    data = open_scoring_data(tmp_path, 32, labelled_as='size=12:20')
    assert data.labelled[0].images.shape[-2:]==(12, 20) and labelled_options('size=16')==dict(size=16)
    assert views_to_gather(tmp_path, data, 32, labelled_as='size=12:20')[0][0].shape[-2:]==(12, 20)

def test_images_are_averaged_when_they_shrink(tmp_path):
    "A board of black and white pixels becomes gray, not black or white"
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

# ---- folders and files as people have them

PAINT = np.array([[0,0,0], [128,0,0], [0,128,0], [200,200,200]], np.uint8)
GREYS = np.array([0, 85, 170, 255], np.uint8)
def write(p, a, **kw):
    p.parent.mkdir(parents=True, exist_ok=True)
    (a if isinstance(a, Image.Image) else Image.fromarray(a)).save(p, **kw)

def indexed(m):
    im = Image.fromarray(m)
    im.putpalette([int(v) for c in PAINT for v in c])
    return im

def pairs(root, photo='images/{part}/{n}.png', mask='masks/{part}/{n}.png', change=lambda m: m, parts=('train', 'val'), **kw):
    "Twelve photographs and masks under any names: eight to learn from, four to score"
    for i,n in enumerate(NAMES):
        at = dict(n=n, part=parts[0 if i<8 else -1])
        write(root/photo.format(**at), IMAGES[i]); write(root/mask.format(**at), change(MASKS[i]), **kw)
    return root

CUT = [i for i in range(12) if i%4!=3] + [3,7,11]      # what becomes of data in one part
PLACES = {   # where photographs and masks are -> the order in which they are read
    'parts outside':      (dict(photo='{part}/images/{n}.png', mask='{part}/masks/{n}.png'), None),
    'parts inside':       (dict(), None),
    'capitals':           (dict(photo='{part}/Images/{n}.png', mask='{part}/Masks/{n}.png', parts=('Train', 'Test')), None),
    'training':           (dict(photo='imgs/{part}/{n}.png', mask='gt/{part}/{n}.png', parts=('training', 'validation')), None),
    'like ADE20K':        (dict(mask='annotations/{part}/{n}.png', parts=('training', 'validation')), None),
    'CamVid':             (dict(photo='{part}/{n}.png', mask='{part}annot/{n}.png'), None),
    'CamVid of Kaggle':   (dict(photo='{part}/{n}.png', mask='{part}_labels/{n}_L.png'), None),
    'mmsegmentation':     (dict(photo='img_dir/{part}/{n}.png', mask='ann_dir/{part}/{n}.png'), None),
    'Roboflow':           (dict(photo='{part}/{n}.png', mask='{part}/{n}_mask.png', parts=('train', 'valid')), None),
    'side by side':       (dict(photo='{n}.png', mask='{n}_label.png'), CUT),
    'one part':           (dict(photo='image/{n}.png', mask='segmentation/{n}_seg.png'), CUT),
    'cities':             (dict(photo='images/{part}/ulm/{n}_leftImg8bit.png', mask='labels/{part}/ulm/{n}_gtFine_labelTrainIds.png'), None),
    'VOC without lists':  (dict(photo='JPEGImages/{n}.png', mask='SegmentationClass/{n}.png'), CUT),
    'a word before':      (dict(photo='images/{part}/img_{n}.png', mask='masks/{part}/mask_{n}.png'), None),
    'deep':               (dict(photo='a/b/images/{part}/{n}.png', mask='a/b/masks/{part}/{n}.png'), None),
}
@pytest.mark.parametrize('what', PLACES)
def test_places(tmp_path, what, capsys):
    kw, order = PLACES[what]
    pairs(tmp_path, **kw)
    for junk in ('.ipynb_checkpoints/00.png', '__MACOSX/images/train/00.png'): write(tmp_path/junk, IMAGES[0])
    got = quiet(tmp_path, (9,14))
    assert (torch.cat([d.masks for d in got]).numpy()==MASKS[order or range(12)]).all()
    assert (torch.cat([d.images for d in got]).permute(0,2,3,1).numpy()==IMAGES[order or range(12)]).all()
    line, = capsys.readouterr().out.splitlines()
    assert line==got[0].read_as==got[1].read_as and line.startswith('read as folder: 4 classes (the labels 0 to 3 are classes); 12 photographs with masks (')

KINDS = {   # how masks are written -> arguments, list of classes, names
    'tif':             (dict(mask='masks/{part}/{n}.tif'), None, None),
    'bmp':             (dict(mask='masks/{part}/{n}.bmp'), None, None),
    'gif':             (dict(mask='masks/{part}/{n}.gif'), None, None),
    '16 bits':         (dict(change=lambda m: m.astype(np.uint16)), None, None),
    'float':           (dict(mask='masks/{part}/{n}.tiff', change=lambda m: m.astype(np.float32)), None, None),
    'palette':         (dict(change=indexed), None, None),
    'RGB of numbers':  (dict(change=lambda m: np.stack([m]*3, -1)), None, None),
    'RGBA of numbers': (dict(change=lambda m: np.stack([m]*3+[m*0+255], -1)), None, None),
    'with alpha':      (dict(change=lambda m: Image.merge('LA', [Image.fromarray(m), Image.new('L', (14,9), 255)])), None, None),
    'webp':            (dict(mask='masks/{part}/{n}.webp', change=lambda m: np.stack([m]*3, -1), lossless=True), None, None),
    'gray scale':      (dict(change=lambda m: GREYS[m]), None, ('0','85','170','255')),
    'gray and names':  (dict(change=lambda m: GREYS[m]), ('classes.txt', 'a\nb\nc\nd'), tuple('abcd')),
    'gray gif':        (dict(mask='masks/{part}/{n}.gif', change=lambda m: GREYS[m]), None, ('0','85','170','255')),
    'colors':          (dict(change=lambda m: PAINT[m]), ('classes.csv', 'name,r,g,b\n'+'\n'.join(f'{n},{r},{g},{b}' for n,(r,g,b) in zip('abcd', PAINT))), tuple('abcd')),
    'colors, CVAT':    (dict(change=lambda m: PAINT[m]), ('labelmap.txt', '# label:color_rgb:parts:actions\n'+'\n'.join(f'{n}:{r},{g},{b}::' for n,(r,g,b) in zip('abcd', PAINT))), tuple('abcd')),
    'Windows':         (dict(), ('classes.txt', '\ufeffa\r\nb\r\nc\r\nd\r\n\r\n'), tuple('abcd')),
    'JSON':            (dict(), ('classes.json', '\ufeff["a", "b", "c", "d"]'), tuple('abcd')),
    'far apart':       (dict(change=lambda m: m.astype(np.uint16)*20000), None, ('0','20000','40000','60000')),
}
@pytest.mark.parametrize('what', KINDS)
def test_kinds_of_masks(tmp_path, what):
    kw, listed, names = KINDS[what]
    pairs(tmp_path, **kw)
    if listed: (tmp_path/listed[0]).write_bytes(listed[1].encode())
    got = quiet(tmp_path, (9,14))
    assert (torch.cat([d.masks for d in got]).numpy()==MASKS).all() and got[0].classes==names

def test_colors_without_a_list_are_classes_in_order(tmp_path):
    got = quiet(pairs(tmp_path, change=lambda m: PAINT[m]), (9,14))
    order = np.argsort(np.argsort(color_label(PAINT)))
    assert (torch.cat([d.masks for d in got]).numpy()==order[MASKS]).all() and got[0].classes==('#000000', '#008000', '#800000', '#c8c8c8')

def test_palettes_that_differ_are_asked(tmp_path):
    "An adaptive palette numbers the colors anew in each file"
    def adaptive(m):
        order = np.random.default_rng(int(m.sum())).permutation(4).astype(np.uint8)
        im = Image.fromarray(np.argsort(order).astype(np.uint8)[m])
        im.putpalette(PAINT[order].flatten().tolist())
        return im
    pairs(tmp_path, change=adaptive)
    with pytest.raises(InputError, match='palettes of .* differ: index .* pass palette=color'): quiet(tmp_path, 9)
    order = np.argsort(np.argsort(color_label(PAINT)))
    assert (torch.cat([d.masks for d in quiet(tmp_path, (9,14), palette='color')]).numpy()==order[MASKS]).all()

def test_a_palette_in_another_order_than_the_list(tmp_path):
    pairs(tmp_path, change=indexed)
    (tmp_path/'class_dict.csv').write_text('name,r,g,b\n'+'\n'.join(f'{n},{r},{g},{b}' for n,(r,g,b) in zip('dcba', PAINT[::-1])))
    got = quiet(tmp_path, (9,14))
    assert got[0].classes==tuple('dcba') and (torch.cat([d.masks for d in got]).numpy()==3-MASKS).all()

@pytest.mark.parametrize('void,change', ((255, lambda m: np.where(m==3, 255, m).astype(np.uint8)), (65535, lambda m: np.where(m==3, 65535, m.astype(int)).astype(np.uint16))))
def test_void_beside_labels(tmp_path, void, change):
    got = quiet(pairs(tmp_path, change=change), (9,14))
    assert got[0].n_classes==3 and (torch.cat([d.masks for d in got]).numpy()==np.where(MASKS==3, 255, MASKS)).all()
    assert f'the labels 0 to 2 are classes, left out: {void}' in got[0].read_as

@pytest.mark.parametrize('values', ((0,255), (0,1), (1,255*257)))
def test_black_and_white(tmp_path, values):
    change = lambda m: np.array(values, np.uint16 if values[1]>255 else np.uint8)[m//2]
    if values[0]:                                                  # 1 and a void of 65535: one class is no score
        with pytest.raises(InputError, match='only the label 1 beside 65535, which is left out: a score needs at least two classes; if that is one, pass ignore_index=none'): quiet(pairs(tmp_path, change=change), 9)
        return
    got = quiet(pairs(tmp_path, change=change), (9,14))
    assert got[0].n_classes==2 and (torch.cat([d.masks for d in got]).numpy()==MASKS//2).all()

def test_jpeg_masks_of_black_and_white(tmp_path):
    big = [np.kron(m//2, np.ones((24,24), np.uint8)) for m in MASKS]
    for i,n in enumerate(NAMES): write(tmp_path/f'images/{n}.png', IMAGES[i].repeat(24, 0).repeat(24, 1)); write(tmp_path/f'masks/{n}.jpg', 255*big[i], quality=95)
    got = quiet(tmp_path, (216,336))
    assert (torch.cat([d.masks for d in got]).numpy()==np.stack(big)[CUT]).mean()>.99

def test_many_classes_and_options(tmp_path):
    wide = lambda m: (m.astype(np.uint16)*100+np.arange(14, dtype=np.uint16)*7)
    pairs(tmp_path, change=wide)
    got = quiet(tmp_path, (9,14), n_classes=1000)
    assert got[0].n_classes==1000 and (got[1].masks.numpy()==wide(MASKS)[8:]).all()
    with pytest.raises(InputError, match='outside 0 to 9'): quiet(tmp_path, 9, n_classes=10)
    pairs(tmp_path/'b', change=lambda m: np.where(m>1, m.astype(int)*1000+7, m).astype(np.uint16))
    got = quiet(tmp_path/'b', (9,14), divisor=1000)
    assert (torch.cat([d.masks for d in got]).numpy()==MASKS).all()
    got = quiet(tmp_path/'b', (9,14), divisor=1000, ignore_index=(0,2))
    assert (torch.cat([d.masks for d in got]).numpy()==np.array([255,1,255,3])[MASKS]).all()
    pairs(tmp_path/'c', 'set/{part}/a/{n}.png', 'set/{part}/b/{n}.png')
    with pytest.raises(InputError, match='look like masks'): quiet(tmp_path/'c', 9)
    assert (torch.cat([d.masks for d in quiet(tmp_path/'c', (9,14), **labelled_options('images=a,labels=b'))]).numpy()==MASKS).all()

def test_what_is_missing_is_said(tmp_path, capsys):
    pairs(tmp_path)
    for p in ('masks/train/02.png', 'images/val/09.png'): (tmp_path/p).unlink()
    write(tmp_path/'images/test/z.png', IMAGES[0])
    got = quiet(tmp_path, (9,14))
    line = capsys.readouterr().out
    assert [len(d) for d in got]==[7,3] and '1 photographs of train without a mask are left out (02.png)' in line
    assert '1 masks without a photograph are left out (09.png)' in line and 'no masks in test, which is skipped' in line
    import shutil; shutil.rmtree(tmp_path/'masks/val'); shutil.rmtree(tmp_path/'images/val')
    assert [d.name.split('-')[-1] for d in quiet(tmp_path, 9)]==['train 3 of 4', 'train every 4th']

ADE = {'by list': lambda r: (r/'objectInfo150.txt').write_text('Idx\tName\n'), 'by name': None, 'own': None, 'own classes': lambda r: (r/'classes.txt').write_text('a\nb\nc\nd')}
@pytest.mark.parametrize('what', ADE)
def test_ade20k_is_told_by_its_files(tmp_path, what):
    pre = 'ADE_' if what=='by name' else ''
    pairs(tmp_path, f'images/{{part}}/{pre}{{n}}.png', f'annotations/{{part}}/{pre}{{n}}.png', parts=('training', 'validation'))
    if ADE[what]: ADE[what](tmp_path)
    got = quiet(tmp_path, (9,14))
    own = what.startswith('own')
    assert got[0].n_classes==(4 if own else 150) and got[0].classes==(tuple('abcd') if what=='own classes' else None)
    assert (torch.cat([d.masks for d in got]).numpy()==(MASKS if own else np.array([255,0,1,2])[MASKS])).all()

def test_labels_up_to_150_in_folders_of_ade20k_are_asked(tmp_path):
    pairs(tmp_path, mask='annotations/{part}/{n}.png', change=lambda m: np.array([0,1,2,150], np.uint8)[m], parts=('training', 'validation'))
    with pytest.raises(InputError, match='pass layout=ade20k'): quiet(tmp_path, 9)
    a, b = (quiet(tmp_path, (9,14), layout=o)[0].masks.numpy() for o in ('ade20k', 'folder'))
    assert (a==np.array([255,0,1,149])[MASKS[:8]]).all() and (b==np.array([0,1,2,150])[MASKS[:8]]).all()

def voc(root, names, listed=None):
    for i,n in enumerate(names): write(root/f'JPEGImages/{n}.png', IMAGES[i]); write(root/f'SegmentationClass/{n}.png', indexed(MASKS[i]))
    (root/'ImageSets/Segmentation').mkdir(parents=True)
    for s,i in dict(train=names[:8], val=names[8:], trainval=names).items(): (root/f'ImageSets/Segmentation/{s}.txt').write_text('\r\n'.join(i))
    if listed: (root/'class_names.txt').write_text(listed)
    return root

def test_own_classes_in_the_folders_of_voc(tmp_path):
    its, own, named = (quiet(voc(tmp_path/k, n, l), (9,14)) for k,n,l in (('a', [f'2007_0000{n}' for n in NAMES], None), ('b', NAMES, None), ('c', NAMES, 'w\nx\ny\nz')))
    assert [o[0].n_classes for o in (its, own, named)]==[21,4,4] and named[0].classes==tuple('wxyz') and its[0].classes[1]=='aeroplane'
    assert all((torch.cat([d.masks for d in o]).numpy()==MASKS).all() for o in (its, own, named))

@pytest.mark.parametrize('end', ('labelIds', 'labelTrainIds', 'instanceIds'))
def test_cityscapes_by_each_of_its_masks(tmp_path, end):
    ids = np.array([*CITYSCAPES_CLASSES][:4], np.uint16)
    write_as = {'labelIds': lambda m: ids[m].astype(np.uint8), 'labelTrainIds': lambda m: m, 'instanceIds': lambda m: np.where(m>1, ids[m]*1000+3, ids[m]).astype(np.uint16)}[end]
    pairs(tmp_path, 'leftImg8bit/{part}/ulm/{n}_leftImg8bit.png', f'gtFine/{{part}}/ulm/{{n}}_gtFine_{end}.png', write_as)
    got = quiet(tmp_path, (9,14))
    assert (torch.cat([d.masks for d in got]).numpy()==MASKS).all() and got[0].n_classes==19 and f'masks are {end}' in got[0].read_as

def coco(root, masks, ids, where='annotations/instances_{}.json', photos='images/{}'):
    "COCO instances as run lengths"
    for part,i in (('train', range(8)), ('val', range(8,12))):
        for j in i: write(root/photos.format(part)/f'{NAMES[j]}.png', IMAGES[j])
        anns = [dict(image_id=j, category_id=ids[c-1], area=1, segmentation=dict(counts=runs_of(masks[j]==c), size=[9,14])) for j in i for c in (1,2,3)]
        f = root/where.format(part)
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(('\ufeff'+json.dumps(dict(images=[dict(id=j, file_name=f'{NAMES[j]}.png', height=9, width=14) for j in i], annotations=anns, categories=[dict(id=c, name=f'c{c}') for c in ids]))).encode())
    return root

@pytest.mark.parametrize('ids', ((0,1,2), (1,2,3), (0,7,90)))
@pytest.mark.parametrize('place', (dict(), dict(where='{}/_annotations.coco.json', photos='{}'), dict(where='annotations/{}.json')))
def test_coco_ids_from_zero_leave_the_background(tmp_path, ids, place):
    got = quiet(coco(tmp_path, MASKS, ids, **place), (9,14))
    assert got[0].classes==('background', *(f'c{i}' for i in ids)) and (torch.cat([d.masks for d in got]).numpy()==MASKS).all()

def test_coco_boxes_are_no_masks(tmp_path):
    (tmp_path/'images').mkdir(); write(tmp_path/'images/a.png', IMAGES[0])
    (tmp_path/'instances.json').write_text(json.dumps(dict(images=[dict(id=0, file_name='a.png', height=9, width=14)], annotations=[dict(image_id=0, category_id=1, bbox=[0,0,1,1])], categories=[dict(id=1, name='a')])))
    with pytest.raises(InputError, match='boxes are not scored here, a mask for each photograph is needed'): quiet(tmp_path)

# ---- photographs turned by their EXIF tag

TURN = {3: 3, 6: 2, 8: 4, 5: 5}           # orientation -> what Pillow does to the upright photograph to store it
def turned(root, tags, drawn):
    "Photographs with these tags; masks drawn on the upright photograph, or on the stored pixels"
    for i,n in enumerate(NAMES):
        t = tags[i%len(tags)]
        store = (lambda a: Image.fromarray(a).transpose(Image.Transpose(TURN[t]))) if t!=1 else Image.fromarray
        tag = Image.Exif(); tag[0x0112] = t
        write(root/f'images/{n}.png', store(IMAGES[i]), exif=tag)
        write(root/f'masks/{n}.png', store(MASKS[i]) if drawn=='stored' else MASKS[i])
    return root

@pytest.mark.parametrize('tags', ((1,6), (8,), (1,3,6), (5,1)))
@pytest.mark.parametrize('drawn', ('upright', 'stored'))
def test_masks_turn_with_their_photographs(tmp_path, tags, drawn, capsys):
    "Sizes of photographs turned by a right angle tell it for those turned by 180 degrees"
    got = quiet(turned(tmp_path, tags, drawn), (9,14))
    assert (torch.cat([d.masks for d in got]).numpy()==MASKS[CUT]).all() and (torch.cat([d.images for d in got]).permute(0,2,3,1).numpy()==IMAGES[CUT]).all()
    assert 'photographs are turned by their EXIF tag, masks count as drawn on the '+drawn in capsys.readouterr().out

def test_half_turns_count_as_upright_unless_said(tmp_path):
    for drawn in ('upright', 'stored'):
        got = quiet(turned(tmp_path/drawn, (3,1), drawn), (9,14), orientation=None if drawn=='upright' else 'stored')
        assert (torch.cat([d.masks for d in got]).numpy()==MASKS[CUT]).all()
    assert 'masks count as drawn on the upright ones' in quiet(tmp_path/'upright', 9)[0].read_as

# ---- hostile folders: one sentence that says what is wrong and where

HOSTILE = {
    'no image':         (lambda r: [p.unlink() for p in (r/'images/val').iterdir()], 'has masks for val, but none of their photographs'),
    'another size':     (lambda r: Image.new('L', (14,8)).save(r/'labels/train/03.png'), '03.png is 14x8, its image 14x9: they must have the same size'),
    'one color mask':   (lambda r: Image.new('RGB', (14,9), (9,8,7)).save(r/'labels/train/03.png'), 'some masks hold colors and some numbers (1, 2, 3)'),
    'broken image':     (lambda r: (r/'images/train/03.png').write_bytes(b'x'), '03.png'),
    'cut mask':         (lambda r: (r/'labels/train/03.png').write_bytes((r/'labels/train/03.png').read_bytes()[:60]), 'cannot read'),
    'only ignored':     (lambda r: [Image.new('L', (14,9), 255).save(p) for p in (r/'labels/val').iterdir()], 'every pixel has the ignored label 255'),
    'all ignored':      (lambda r: [Image.new('L', (14,9), 255).save(p) for p in (r/'labels').glob('*/*')], 'every pixel has the ignored label 255'),
    'outside the list': (lambda r: (r/'classes.txt').write_text('a\nb\n'), 'masks hold the labels 2, 3, which are no class of classes.txt (labels 0, 1): add them there'),
    'one split':        (lambda r: [(r/k/'val').rename(r/k/'other') for k in ('images','labels')], 'has no split val or test: it has other, train'),
    'colors elsewhere': (lambda r: recolor(r), 'look like masks, as x/'),
    'labels elsewhere': (lambda r: (r/'labels').rename(r/'elsewhere'), 'look like masks, as elsewhere/'),
    'two stems':        (lambda r: Image.new('RGB', (14,9)).save(r/'images/train/03.jpg'), '03.jpg and 03.png have the same name'),
    'one class':        (lambda r: [Image.new('L', (14,9), 7).save(p) for p in (r/'labels').glob('*/*')], 'the masks hold only the label 7: a score needs at least two classes'),
    'one and void':     (lambda r: [Image.fromarray(np.where(m, 3, 255).astype(np.uint8)).save(p) for p,m in zip((r/'labels').glob('*/*'), MASKS)], 'hold only the label 3 beside 255, which is left out'),
    'instance numbers': (lambda r: [Image.fromarray(np.where(m==3, 26001, m.astype(int)).astype(np.uint16)).save(p) for p,m in zip((r/'labels').glob('*/*'), MASKS)], 'pass divisor=1000'),
    'smoothed':         (lambda r: [Image.fromarray(m).resize((14,9), 3).save(p) for p,m in zip((r/'labels').glob('*/*'), blots(12))], 'as if smoothed: pass threshold=128'),
    'JPEG':             (lambda r: [(p.unlink(), Image.fromarray(50*m).save(p.with_suffix('.jpg'))) for p,m in zip([*(r/'labels').glob('*/*')], MASKS)], 'compressed in a way that changes labels'),
    'bad list':         (lambda r: (r/'classes.tsv').write_text('sky road tree'), 'must hold a label, a tab and a name'),
    'bad json':         (lambda r: (r/'panoptic.json').write_text('['), 'cannot read'),
    'json of numbers':  (lambda r: (r/'panoptic.json').write_text('[1]'), 'is no COCO panoptic file'),
    'json without ids': (lambda r: (r/'instances.json').write_text('{"images": [{}], "annotations": [], "categories": []}'), 'is no COCO instances file'),
}
def recolor(root):
    "Masks in colors, in a folder whose name says nothing"
    (root/'x').mkdir()
    for p,m in zip([*(root/'labels').glob('*/*')], MASKS): p.unlink(); Image.fromarray(PAINT[m]).save(root/'x'/p.name)

def blots(n):
    "Black masks with a white disk, six times as large"
    y, x = np.indices((54,84))
    return [(np.hypot(y-27, x-30-i)<12).astype(np.uint8)*255 for i in range(n)]

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
    for im,mask in find_layout(DATA/'coco_mini')[2].splits['val2017'][:10]: assert ((m := read_panoptic(mask))[m!=BACKGROUND]==np.array(Image.open(DATA/'coco_mini/semantic'/mask.file.name))[m!=BACKGROUND]).all()
    things = quiet(DATA/'coco_mini', layout='coco-instances')
    assert [len(d) for d in things]==[167, 67] and things[0].n_classes==81

# ---- what evaluation does with a folder

def test_videos_are_told_from_boxes_and_from_photographs(tmp_path):
    from densessl.evaluation.report import is_davis, open_scoring_data
    davis, boxes = tmp_path/'davis', tmp_path/'boxes'
    write(davis/'JPEGImages/480p/x/0.png', IMAGES[0]); write(davis/'Annotations/480p/x/0.png', MASKS[0])
    write(boxes/'JPEGImages/a.png', IMAGES[0]); (boxes/'Annotations').mkdir(); (boxes/'Annotations/a.xml').write_text('<annotation/>')
    assert is_davis(davis) and not is_davis(boxes) and not is_davis(plain(tmp_path/'set'))
    with pytest.raises(InputError, match='boxes of Pascal VOC .as a.xml.: boxes are not scored here'): open_scoring_data(boxes, 32)
    recolor(tmp_path/'set')
    with pytest.raises(InputError, match='look like masks'): open_scoring_data(tmp_path/'set', 32)
    with pytest.raises(InputError, match="'color=1' in --labelled_as is not one of"): open_scoring_data(tmp_path/'set', 32, labelled_as='color=1')

def test_photographs_alone_are_said_to_be_unlabelled(tmp_path, capsys):
    from densessl.evaluation.report import open_scoring_data
    save(tmp_path, [np.kron(i, np.ones((4,4,1), np.uint8)) for i in IMAGES])
    open_scoring_data(tmp_path, 32)
    assert capsys.readouterr().out=='read as photographs without labels: 12 of 12\n'

def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    from densessl.evaluation.davis import davis_sequences
    for t in range(12): write(tmp_path/f'JPEGImages/480p/x/{t}.png', IMAGES[t]); write(tmp_path/f'Annotations/480p/x/{t}.png', MASKS[t])
    (tmp_path/'ImageSets/2017').mkdir(parents=True); (tmp_path/'ImageSets/2017/val.txt').write_text('x\n')
    video = davis_sequences(tmp_path)[0].load()
    assert (video.masks.numpy()==MASKS).all() and (video.frames.permute(0,2,3,1).numpy()==IMAGES).all()

# ---- what tools and public sets write

RARE = np.zeros((12,9,14), np.uint8)
RARE[:,2:6,3:9] = 1
RARE[:,6:,9:] = 2

def named_files(root, photo, mask, masks=RARE, n=8):
    "Photographs and masks under names with {} for a number"
    for i in range(n):
        for name,o in ((photo, IMAGES[i]), (mask, masks[i])):
            p = root/name.format(f'{i:02}')
            p.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(o).save(p)
    return root

AROUND = {'fastai': ('images/0001TP_{}.png', 'labels/0001TP_{}_P.png', 'NAME_P'),
          'task': ('images/a{}.png', 'masks/task-1-a{}-final.png', 'task-1-NAME-final'), 'iSAID': ('train/images/P{}.png', 'train/Semantic_masks/P{}_instance_color_RGB.png', 'NAME_instance')}

@pytest.mark.parametrize('kind', AROUND)
def test_a_constant_word_around_the_name(tmp_path, kind, capsys):
    photo, mask, says = AROUND[kind]
    a, b = quiet(named_files(tmp_path, photo, mask), size=(9,14))
    assert len(a)+len(b)==8 and (a.masks[0].numpy()==RARE[0]).all() and f'masks are named {says}' in capsys.readouterr().out

def test_two_constant_words_are_no_guess(tmp_path):
    named_files(tmp_path, 'images/{}.png', 'masks/{}_p.png'); named_files(tmp_path, 'images/{}.png', 'masks/{}_q.png')
    with pytest.raises(InputError, match='no mask has the name of a photograph'): labelled_data(tmp_path)

@pytest.mark.parametrize('photo,mask', [('images/É{}.png', 'masks/E\u0301{}.png'), ('images/IMG_{}.JPG', 'masks/img_{}.PNG'), ('default/{}.png', 'defaultannot/{}.png'),
                                        ('train2017/{}.jpg', 'stuffthingmaps/train2017/{}.png')])
def test_names_that_differ_in_writing(tmp_path, photo, mask):
    a, b = quiet(named_files(tmp_path, photo, mask), size=(9,14))
    assert len(a)+len(b)==8 and a.n_classes==3

@pytest.mark.parametrize('photos', [('images/s1/{}.png', 'images/s2/{}.png'), ('train/images/{}.png', 'val/images/{}.png'), ('A/{}.png', 'B/{}.png')])
def test_one_mask_is_not_given_to_two_photographs(tmp_path, photos):
    for o in photos: named_files(tmp_path, o, 'masks/{}.png')
    with pytest.raises(InputError, match=r'masks/00.png in .* could be the mask of .*00.png and of .*00.png'): labelled_data(tmp_path)

def test_a_path_chooses_among_several_masks(tmp_path):
    for v in ('v1', 'v2'):
        for s in ('training', 'validation'):
            for k in ('labels', 'instances'): named_files(tmp_path, f'{s}/images/{{}}.jpg', f'{s}/{v}/{k}/{{}}.png', RARE if v=='v2' else RARE+1, 4)
    with pytest.raises(InputError, match='training/v1/labels/00.png and training/v2/labels/00.png in'): labelled_data(tmp_path)
    assert quiet(tmp_path, size=(9,14), labels='v2/labels')[0].masks.unique().tolist()==[0,1,2]

LISTS = {'two': ({'train.txt': range(5), 'val.txt': (5,6,7)}, [5,3], 'parts are those of train.txt, val.txt'), 'rest': ({'valid.txt': (6,7)}, [6,2], 'train is the rest'),
         'paths': ({'splits/train.txt': range(5), 'splits/test.txt': (6,7)}, [5,2], '1 photographs that no list names are left out (05)'),
         'pets': ({'annotations/trainval.txt': range(6), 'annotations/test.txt': (6,7)}, [6,2], 'trainval')}
LINES = dict(two='{}', rest='{}.jpg', paths='images/{}.jpg masks/{}.png', pets='{} 1 1 1')

@pytest.mark.parametrize('kind', LISTS)
def test_lists_beside_plain_folders(tmp_path, kind, capsys):
    lists, sizes, says = LISTS[kind]
    named_files(tmp_path, 'images/{}.jpg', 'masks/{}.png')
    for name,numbers in lists.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(''.join(LINES[kind].replace('{}', f'{i:02}')+'\n' for i in numbers))
    data = quiet(tmp_path, size=(9,14))
    assert [len(o) for o in data]==sizes and says in capsys.readouterr().out

def test_lists_that_overlap_or_name_other_files(tmp_path, capsys):
    named_files(tmp_path, 'images/{}.jpg', 'masks/{}.png')
    (tmp_path/'train.txt').write_text('x\ny\n')
    assert [len(o) for o in quiet(tmp_path, size=(9,14))]==[6,2] and 'train.txt name other files or folders and are not used' in capsys.readouterr().out
    for o in ('train.txt', 'val.txt'): (tmp_path/o).write_text('00\n01\n')
    with pytest.raises(InputError, match='2 photographs are in several of the lists train.txt, val.txt, such as 00'): labelled_data(tmp_path)

@pytest.mark.parametrize('data', [b'', b'<html>404', 'cut'])
def test_damaged_masks_and_palette_files(tmp_path, data):
    named_files(tmp_path, 'images/{}.jpg', 'masks/{}.png')
    p = tmp_path/'masks/03.png'
    im = Image.open(p).resize((300,300)).convert('P')
    im.save(p)
    p.write_bytes(p.read_bytes()[:-200] if data=='cut' else data)
    with pytest.raises(InputError, match='cannot read .*03.png'): labelled_data(tmp_path)

@pytest.mark.parametrize('values', [(0,100,200), (0,40,80)])
def test_smoothed_masks_of_several_values(tmp_path, values):
    m = np.zeros((12,90,140), np.uint8)
    m[:,20:60,30:60], m[:,40:,90:] = values[1], values[2]
    soft = np.stack([np.asarray(Image.fromarray(o).resize((200,130), Image.Resampling.BICUBIC).resize((14*9,9*9), Image.Resampling.BICUBIC)) for o in m])
    named_files(tmp_path, 'images/{}.jpg', 'masks/{}.png', soft)
    with pytest.raises(InputError, match='more at few pixels, as if smoothed: .* n_classes='): labelled_data(tmp_path)

@pytest.mark.parametrize('text,shift,names', [('__ignore__\n_background_\ncat\ndog\n', 0, ('_background_', 'cat', 'dog')), ('"sky"\n"cat"\n"dog"\n', 0, ('sky', 'cat', 'dog')),
                                              ('sky\ncat\ndog\n', 1, ('sky', 'cat', 'dog'))])
def test_lists_of_classes_of_other_tools(tmp_path, text, shift, names):
    "LabelMe's -1 comes first; quotes are no part of a name; MATLAB counts from 1"
    named_files(tmp_path, 'images/{}.jpg', 'masks/{}.png', RARE+np.uint8(shift))
    (tmp_path/'labels.txt').write_text(text)
    a, _ = quiet(tmp_path, size=(9,14))
    assert a.classes==names and (a.masks[0].numpy()==RARE[0]).all()

def coco_of(root, file_name, names=('background', 'box')):
    save(root/'images', IMAGES[:6], NAMES[:6], 'jpg')
    box = lambda i, c: dict(id=i, image_id=i, category_id=c, segmentation=[[2,2,8,2,8,6,2,6]], area=24, bbox=[2,2,6,4], iscrowd=0)
    d = dict(images=[dict(id=i, file_name=file_name.format(NAMES[i]), height=9, width=14) for i in range(6)], annotations=[box(i, 1) for i in range(6)], categories=[dict(id=i, name=o) for i,o in enumerate(names)])
    (root/'instances_default.json').write_text(json.dumps(d))

@pytest.mark.parametrize('file_name', ['{}.jpg', 'D:\\sets\\{}.jpg', '/srv/sets/{}.jpg', '../../label-studio/media/{}.jpg'])
def test_coco_photographs_of_another_machine_and_a_category_background(tmp_path, file_name):
    coco_of(tmp_path, file_name)
    a, _ = quiet(tmp_path, size=(9,14))
    assert a.classes==('background', 'box') and a.masks[0].numpy().sum()==24

def test_coco_photographs_of_one_name_are_refused(tmp_path):
    coco_of(tmp_path, '/data/{}.jpg')
    f = tmp_path/'instances_default.json'
    f.write_text(f.read_text().replace('/data/01.jpg', '/other/00.jpg'))
    with pytest.raises(InputError, match='00.jpg is listed twice'): labelled_data(tmp_path)

# ---- folders of public sets and tools: the right masks, or one sentence

def read_right(root, masks=MASKS, sizes=(8,4), size=(9,14), **kw):
    "Every mask is that of its photograph, whose number is its name; returns what was said"
    said = []
    parts = quiet(root, size, load=False, say=said.append, **kw)
    for files in parts:
        for photo,mask in files.pairs:
            i = int(''.join(c for c in photo.name if c.isdigit())[:2])
            x, m = files.one(photo, mask)
            assert (m.numpy()==masks[i]).all() and (x.permute(1,2,0).numpy()==IMAGES[i]).all()
    assert sizes is None or tuple(map(len, parts))==sizes
    return said[0]

PUBLIC = {   # photographs, masks, parts, and whether there are two
    'parts in longer names':  ('uavid_{part}/seq1/Images/{n}.png', 'uavid_{part}/seq1/Labels/{n}.png', ('train', 'val'), True),
    'saliency':               ('DUTS-{part}/DUTS-{part}-Image/{n}.png', 'DUTS-{part}/DUTS-{part}-Mask/{n}.png', ('TR', 'TE'), True),
    'polyps':                 ('{part}Dataset/images/{n}.png', '{part}Dataset/masks/{n}.png', ('Train', 'Test'), True),
    'sets':                   ('{part}_set/images/{n}.png', '{part}_set/masks/{n}.png', ('training', 'test'), True),
    'eyes with letters':      ('1. Original Images/{part} Set/{n}.png', '2. Groundtruths/{part} Set/{n}.png', ('a. Training', 'b. Testing'), True),
    'people':                 ('TrainVal_images/{part}_images/{n}.png', 'TrainVal_parsing_annotations/{part}_segmentations/{n}.png', ('train', 'val'), True),
    'a shared word for masks': ('seg/images/{part}/{n}.png', 'seg/labels/{part}/{n}_train_id.png', ('train', 'val'), True),
    'nnU-Net':                ('imagesTr/{n}_0000.png', 'labelsTr/{n}.png', ('', ''), False),
    'bad weather':            ('rgb_anon/fog/{part}/{n}_rgb_anon.png', 'gt/fog/{part}/{n}_gt_labelIds.png', ('train', 'val'), True),
    'tiles':                  ('output/{n}.png', 'output/{n}_m.png', ('', ''), False),
    'two suffixes':           ('img/{n}.png', 'masks/{n}.png.png', ('', ''), False),
    'suffix and word':        ('a/{n}.png', 'a/{n}.png_mask.png', ('', ''), False),
    'labelme2voc':            ('JPEGImages/{n}.png', 'SegmentationClassPNG/{n}.png', ('', ''), False),
}
@pytest.mark.parametrize('what', PUBLIC)
def test_names_of_public_sets(tmp_path, what):
    photo, mask, parts, two = PUBLIC[what]
    pairs(tmp_path, photo, mask, parts=parts)
    said = read_right(tmp_path, sizes=(8,4) if two else (9,3))
    assert ('every 4th' in said) != two

def test_a_word_of_a_part_is_no_part_by_itself(tmp_path):
    for i,n in enumerate(NAMES):
        for k,o in (('images', IMAGES), ('masks', MASKS)): write(tmp_path/k/('bus_station', 'train_station')[i%2]/f'{n}.png', o[i])
    read_right(tmp_path, sizes=(9,3))

LINES_OF = {'train_list.txt': '{}.png labels/{}.png', 'Train.txt': '\ufeffimages\\{}.png\r', 'train-ids.lst': '{}', 'train.csv': '"images/{}.png",1'}
@pytest.mark.parametrize('name', LINES_OF)
def test_lists_of_any_usual_name(tmp_path, name):
    pairs(tmp_path, 'images/{n}.png', 'masks/{n}.png')
    for part,names in dict(train=NAMES[:8], val=NAMES[8:]).items():
        file = name.replace('train', part).replace('Train', 'Val')
        (tmp_path/file).write_text(''.join(LINES_OF[name].replace('{}', n)+'\n' for n in names))
    assert 'parts are those of' in read_right(tmp_path)

COPIES = {'kitti': ('semantic', 'semantic_rgb'), 'supervisely': ('masks_machine', 'masks_human'), 'game': ('GT/LABELS', 'GT/COLOR'), 'mine': ('masks', 'masks_color')}
@pytest.mark.parametrize('what', COPIES)
def test_numbers_are_taken_before_their_colored_copies(tmp_path, what):
    numbers, colors = COPIES[what]
    pairs(tmp_path, 'image_2/{n}.png', f'{numbers}/{{n}}.png')
    pairs(tmp_path, 'image_2/{n}.png', f'{colors}/{{n}}.png', lambda m: PAINT[m])
    assert f'12 more masks of these photographs are left out (as {colors}/00.png)' in read_right(tmp_path, sizes=(9,3))
    read_right(tmp_path, sizes=(9,3), labels=numbers)

@pytest.mark.parametrize('hand,other,name', (('1st_manual', '2nd_manual', '{n}_manual1.gif'), ('manual1', 'manual2', '{n}.tif')))
def test_a_field_of_view_is_no_mask(tmp_path, hand, other, name):
    "Photographs of eyes: the folder mask says where the camera sees anything"
    view = np.zeros((9,14), np.uint8); view[2:7,2:12] = 255
    black = lambda m: np.where(m>1, 255, 0).astype(np.uint8)
    pairs(tmp_path, '{part}/images/{n}_training.png', f'{{part}}/{hand}/{name}', black, parts=('training', 'test'))
    pairs(tmp_path, '{part}/images/{n}_training.png', '{part}/mask/{n}_training_mask.gif', lambda m: view, parts=('training', 'test'))
    pairs(tmp_path, '{part}/images/{n}_training.png', f'{{part}}/{other}/{name}', lambda m: 255-black(m), parts=('training', 'test'))
    assert f'masks are those of {hand}' in read_right(tmp_path, MASKS//2)

@pytest.mark.parametrize('first,names', (('unlabeled', ('a','b','c')), ('person', ('person','a','b','c'))))
def test_numbers_of_stuffthingmaps_begin_one_later_than_their_list(tmp_path, first, names):
    pairs(tmp_path, 'images/{part}2017/{n}.png', 'stuffthingmaps/{part}2017/{n}.png', lambda m: np.where(m==3, 255, m).astype(np.uint8))
    (tmp_path/'labels.txt').write_text(f'0: {first}\n1: a\n2: b\n3: c\n')
    read_right(tmp_path, np.where(MASKS==3, 255, MASKS))
    assert quiet(tmp_path)[0].classes==names

def objects(i):
    m = np.zeros((9,14), np.uint16)
    for k in range(9+i): m[k//7*2,k%7*2] = k+1
    return m

def each_object(root):
    for i,n in enumerate(NAMES):
        write(root/f'stage1_train/{n}/images/{n}.png', IMAGES[i])
        for c in (1,2): write(root/f'stage1_train/{n}/masks/{n}f{c}e.png', np.where(MASKS[i]==c, 255, 0).astype(np.uint8))

def arrays(ext, photo='images/{n}.png', mask='masks/{n}', photos=True):
    def make(root):
        for i,n in enumerate(NAMES):
            if photos: write(root/photo.format(n=n), IMAGES[i])
            f = root/f'{mask.format(n=n)}{ext}'
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_bytes(b'x')
    return make

def two_years(root):
    for year in ('VOC2007', 'VOC2012'): voc(root/'VOCdevkit'/year, [f'2007_0000{n}' for n in NAMES])

REFUSED = {
    'arrays beside':       (arrays('.npy'), 'holds masks in .npy files (as 00.npy): save each as a PNG file'),
    'arrays by name':      (arrays('.npz', '{n}.png', '{n}_mask'), 'holds masks in .npz files'),
    'MATLAB':              (arrays('.mat', 'img/{n}.png', 'cls/{n}'), 'holds masks in .mat files'),
    'volumes':             (arrays('.nii.gz', mask='labelsTr/{n}', photos=False), 'holds masks in .nii.gz files'),
    'a mask an object':    (each_object, 'holds several masks for one photograph, as if each showed one object: merge them'),
    'a mask a class':      (lambda r: [pairs(r, 'images/{n}.png', f'masks/{c}/{{n}}.png', lambda m: m//2*255) for c in ('cat', 'dog')], 'if each shows one class or one object, merge them'),
    'numbers of objects':  (lambda r: [(write(r/f'images/{n}.png', IMAGES[i]), write(r/f'masks/{n}.png', objects(i))) for i,n in enumerate(NAMES)], 'each mask holds all numbers from 1 to its own last one, 9 to 20'),
    'two ways':            (lambda r: [(write(r/f'images/{n}.png', IMAGES[i]), write(r/f'masks/{n}.png', (MASKS[i]//2*(255 if i%2 else 1)).astype(np.uint8))) for i,n in enumerate(NAMES)], 'some masks hold 0 and 1, others 0 and 255'),
    'transparency':        (lambda r: pairs(r, 'images/{n}.png', 'masks/{n}.png', lambda m: np.dstack([np.zeros((9,14,3), np.uint8), m//2*255])), "getchannel('A')"),
    'ADE20K, all of it':   (lambda r: pairs(r, 'images/ADE/{part}/urban/ADE_train_{n}.png', 'images/ADE/{part}/urban/ADE_train_{n}_seg.png', lambda m: PAINT[m]), 'is the full release of ADE20K'),
    'videos':              (lambda r: pairs(r, 'JPEGImages/480p/a/{n}.png', 'Annotations/480p/a/{n}.png'), 'scored by davis_score; pass layout=folder'),
    'two sets':            (two_years, 'holds 2 sets, VOC2007, VOC2012: give the folder of one'),
}
@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_told_is_refused(tmp_path, what):
    make, said = REFUSED[what]
    make(tmp_path)
    with pytest.raises(InputError) as e: quiet(tmp_path, 9)
    assert said in str(e.value) and '\n' not in str(e.value) and not isinstance(e.value, Unlabelled)

ADVICE = {'numbers of objects': (dict(threshold=1), np.stack([objects(i)>0 for i in range(12)])), 'two ways': (dict(threshold=1), MASKS//2), 'videos': (dict(layout='folder'), MASKS)}
@pytest.mark.parametrize('what', ADVICE)
def test_the_advice_works(tmp_path, what):
    kw, masks = ADVICE[what]
    REFUSED[what][0](tmp_path)
    read_right(tmp_path, masks, (9,3), **kw)

def test_threshold_of_16_bits(tmp_path):
    pairs(tmp_path, 'images/{n}.png', 'masks/{n}.png', lambda m: m.astype(np.uint16)*300)
    read_right(tmp_path, (MASKS>1).astype(int), (9,3), threshold=600)

def test_transparent_pixels_are_black(tmp_path):
    pairs(tmp_path, 'images/{n}.png', 'masks/{n}.png', lambda m: np.dstack([np.full((9,14), 255, np.uint8), m//2*255]))
    read_right(tmp_path, MASKS//2, (9,3))

def test_coco_says_what_it_leaves_out(tmp_path):
    coco_of(tmp_path, '{}.jpg')
    f = tmp_path/'instances_default.json'
    d = json.loads(f.read_text())
    d['annotations'][1]['segmentation'] = []
    f.write_text(json.dumps(d))
    (tmp_path/'images/05.jpg').unlink()
    a, b = quiet(tmp_path, size=(9,14))
    assert len(a)+len(b)==5 and '1 listed photographs that are not there are left out (05.jpg)' in a.read_as
    assert '1 of 5 instances have no outline and are not drawn' in a.read_as and not a.masks[1].any()
    for wrong in ([['a','b','c','d']], [1,2,3,4], dict(size=[9,14])):
        d['annotations'][0]['segmentation'] = wrong
        f.write_text(json.dumps(d))
        with pytest.raises(InputError, match='00.jpg: an annotation is no polygon and no run-length code'): quiet(tmp_path)
    for p in (tmp_path/'images').iterdir(): p.unlink()
    with pytest.raises(InputError, match='is not there, and no other listed photograph is'): quiet(tmp_path)

@pytest.mark.parametrize('copy', ('{}_m.jpg', '{}_color.png'))
def test_copies_of_photographs_are_no_masks(tmp_path, copy):
    for i,n in enumerate(NAMES): write(tmp_path/f'{n}{Path(copy).suffix}', IMAGES[i]); write(tmp_path/copy.format(n), IMAGES[i][::2,::2])
    with pytest.raises(Unlabelled): quiet(tmp_path)

def test_two_sets_may_be_the_parts(tmp_path):
    two_years(tmp_path)
    a, b = quiet(tmp_path, (9,14), **labelled_options('splits=VOC2007:VOC2012'))
    assert (a.masks.numpy()==MASKS).all() and (b.masks.numpy()==MASKS).all()

def test_text_files_are_lists_before_tables(tmp_path):
    pairs(tmp_path, 'images/{n}.png', 'masks/{n}.png')
    for part,names in dict(train=NAMES[:8], val=NAMES[8:]).items(): (tmp_path/f'{part}.txt').write_text('\n'.join(names))
    (tmp_path/'train.csv').write_text('id,rle\nx,1\ny,2\n')
    read_right(tmp_path)

def test_a_list_without_the_background(tmp_path):
    pairs(tmp_path, 'images/{n}.png', 'masks/{n}.png', lambda m: m//2*255)
    (tmp_path/'classes.txt').write_text('polyp\n')
    with pytest.raises(InputError, match='add them there .the background is its first line, if 0 is that'): quiet(tmp_path)
    (tmp_path/'classes.txt').write_text('background\npolyp\n')
    read_right(tmp_path, MASKS//2, (9,3))

@pytest.mark.parametrize('black', (0, '#000000'))
def test_black_left_out_of_colors(tmp_path, black):
    pairs(tmp_path, 'images/{n}.png', 'masks/{n}.png', lambda m: PAINT[m])
    read_right(tmp_path, np.array([255,1,0,2])[MASKS], (9,3), ignore_index=black)
