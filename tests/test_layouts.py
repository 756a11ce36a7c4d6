"Folders of each layout become the boxes, masks, classes and crowds that were written into them"
import json, os, pickle
from collections import defaultdict
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from pycocotools import mask as runs
from torch.utils.data import DataLoader

from densessl.ground.core import InputError
from densessl.transfer import instances, layouts
from densessl.transfer.ap import coco_scores, voc_scores
from densessl.transfer.instances import encode_mask, number_notes
from densessl.transfer.layouts import INSTANCE_LAYOUTS, cityscapes_scores, instance_data, read_image
from densessl.transfer.together import keypoint_pairs

def photo(path, wh=(20,16), color=(200,30,60), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', wh, color).save(path, **kwargs)

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))

def save_numbers(path, numbers, mode=np.uint8, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = Image.fromarray(np.asarray(numbers).astype(mode))
    if palette:                                                      # of 8 bits it becomes a palette file, its numbers unchanged
        im.putpalette([v for i in range(256) for v in (i*7%256, i*13%256, i*29%256)])
    im.save(path)

def rectangle(x, y, w, h, hw=(16,20)):
    m = np.zeros(hw, bool)
    m[y:y+h,x:x+w] = True
    return m

def read_back(data, kind):
    "Items as they are read, said as results of a detector"
    said, category = [], [c['id'] for c in data.truth['categories']]
    for entry,(_, target) in zip(data.truth['images'], data):
        for k,(x0, y0, x1, y1) in enumerate(target['boxes'].tolist()):
            d = dict(image_id=entry['id'], category_id=category[target['labels'][k]-1], score=.9, bbox=[x0, y0, x1-x0, y1-y0])
            if kind=='segm': d['segmentation'] = encode_mask(target['masks'][k].numpy())
            if kind=='keypoints':
                points = target['keypoints'][k].clone()
                points[:,:2] -= .5
                d['keypoints'] = points.flatten().tolist()
            said.append(d)
    return said

def AP_of_itself(data, kind='bbox'): return round(coco_scores(data.truth, read_back(data, kind), kind)[0]['AP'], 9)

def runs_by_hand(m):
    "Uncompressed run lengths, column by column, 0 first"
    counts, value, n = [], False, 0
    for v in m.T.ravel():
        if v!=value: counts, value, n = counts+[n], v, 0
        n += 1
    return counts+[n]

# ---- COCO

CATEGORIES = [dict(id=3, name='car'), dict(id=18, name='dog')]

def coco_json(first=1, **more):
    "Three images: a polygon and run lengths; a crowd and compressed run lengths; nothing"
    images = [dict(id=first+k, file_name=f'{first+k}.jpg', width=20, height=16) for k in range(3)]
    def note(i, image, category, box, code, crowd=0):
        return dict(id=i, image_id=first+image, category_id=category, bbox=box, segmentation=code, iscrowd=crowd, area=box[2]*box[3])
    notes = [note(0, 0, 18, [2,3,6,4], [[2,3,8,3,8,7,2,7]]),
             note(1, 0, 3, [10,1,3,5], dict(size=[16,20], counts=runs_by_hand(rectangle(10,1,3,5)))),
             note(2, 1, 18, [0,0,9,9], dict(size=[16,20], counts=runs_by_hand(rectangle(0,0,9,9))), 1),
             note(3, 1, 3, [12,8,8,8], encode_mask(rectangle(12,8,8,8)))]
    return dict(images=images, annotations=notes, categories=CATEGORIES) | more

@pytest.fixture
def coco(tmp_path):
    for part,first in (('train2017', 1), ('val2017', 11)):
        write(tmp_path/f'annotations/instances_{part}.json', coco_json(first))
        for k in range(3): photo(tmp_path/part/f'{first+k}.jpg')
    write(tmp_path/'annotations/captions_train2017.json', dict(images=[], annotations=[]))
    return tmp_path

def test_coco(coco, capsys):
    train, test = instance_data(coco)
    assert 'read as coco-instances: 2 classes; 2 images (train2017) with 3 objects and 1 crowd; 3 images (val2017) with 3 objects and 1 crowd; ' \
           'train2017: 1 image without an object left out' in capsys.readouterr().out
    assert (len(train), len(test)) == (2, 3) and test.name.endswith('-val2017') and test.classes==('car', 'dog')
    image, target = test[0]
    assert image.shape==(3,16,20) and image.dtype==torch.uint8 and abs(int(image[0].float().mean())-200)<5
    assert target['boxes'].tolist()==[[2,3,8,7],[10,1,13,6]] and target['labels'].tolist()==[2,1]
    assert np.array_equal(target['masks'].numpy(), [rectangle(2,3,6,4), rectangle(10,1,3,5)])
    image, target = test[1]                                         # the crowd is known to the scorer alone
    assert target['labels'].tolist()==[1] and np.array_equal(target['masks'][0].numpy(), rectangle(12,8,8,8))
    assert [n['iscrowd'] for n in test.truth['annotations']]==[0,0,1,0]
    assert [n['id'] for n in test.truth['annotations']]==[1,2,3,4]  # pycocotools takes 0 for none
    assert len(test[2][1]['labels'])==0
    assert AP_of_itself(test)==AP_of_itself(test, 'segm')==1

def test_one_file_divided_by_split(tmp_path):
    both = [coco_json(1), coco_json(11)]
    for part,d in zip(('train2017', 'val2017'), both):
        for e in d['images']: e['split'] = part
    write(tmp_path/'mini/instances.json', {k: both[0][k]+(both[1][k] if k!='categories' else []) for k in both[0]})
    for i in (1,2,3,11,12,13): photo(tmp_path/f'mini/images/{i}.jpg')
    train, test = instance_data(tmp_path, say=None)                 # the only folder inside is entered
    assert [e['id'] for e in train.truth['images']]==[1,2] and [e['id'] for e in test.truth['images']]==[11,12,13]
    assert test[1][1]['boxes'].tolist()==[[12,8,20,16]]

def test_no_parts_are_said(tmp_path):
    d = dict(coco_json(), images=[dict(id=k, file_name=f'C:\\pictures\\{k}.jpg', width=20, height=16) for k in range(1, 9)])
    d['annotations'] = [dict(d['annotations'][0], image_id=k) for k in range(1, 9)]
    write(tmp_path/'instances_default.json', d)
    for k in range(1, 9): photo(tmp_path/f'images/{k}.jpg')
    said = []
    train, test = instance_data(tmp_path, say=said.append)
    assert [e['id'] for e in test.truth['images']]==[4,8] and '6 images (3 of 4) with 6 objects; 2 images (every 4th) with 2 objects' in said[0]
    assert test.read_as==said[0] and AP_of_itself(test, 'segm')==1

def test_json_beside_the_images(tmp_path):
    for part,first in (('train', 1), ('valid', 11), ('test', 21)):
        write(tmp_path/part/'_annotations.coco.json', coco_json(first))
        for k in range(3): photo(tmp_path/part/f'{first+k}.jpg')
    train, test = instance_data(tmp_path, say=None)
    assert train.name.endswith('-train') and test.name.endswith('-valid') and test[0][1]['labels'].tolist()==[2,1]
    _, test = instance_data(tmp_path, splits=('train', 'test'), say=None)
    assert [e['id'] for e in test.truth['images']]==[21,22,23]

def test_classes_and_limit(coco):
    train, test = instance_data(coco, classes=['dog'], say=None)
    assert train.classes==('dog',) and [e['id'] for e in train.truth['images']]==[1]    # the crowd of dogs teaches nothing
    assert [n['iscrowd'] for n in test.truth['annotations']]==[0,1]
    train, test = instance_data(coco, one_class='thing', limit=1, say=None)
    assert train.classes==('thing',) and len(train)==len(test)==1 and train[0][1]['labels'].tolist()==[1,1]

def test_empty_objects_are_counted(coco):
    f = coco/'annotations/instances_train2017.json'
    d = json.loads(f.read_text())
    more = [dict(bbox=[2,3,0,4]), dict(segmentation=[[4,4,4.1,4,4.1,4.1,4,4.1]]), dict(segmentation=[]), dict(segmentation=[[1,1,9,9]])]
    d['annotations'] += [dict(d['annotations'][0], id=9+k, **o) for k,o in enumerate(more)]
    write(f, d)
    train, _ = instance_data(coco, say=None)
    assert len(train.truth['annotations'])==4
    assert '1 object without width or height left out; train2017: 3 objects whose mask covers no pixel left out' in train.read_as
    assert len(instance_data(coco, kinds=(), say=None)[0].truth['annotations'])==7

def test_masks_are_decoded_when_read(coco, monkeypatch):
    def no(*args): raise AssertionError
    monkeypatch.setattr(instances.runs, 'decode', no)
    train, _ = instance_data(coco, say=None)
    with pytest.raises(AssertionError): train[0]
    boxes, _ = instance_data(coco, kinds=(), say=None)
    assert 'masks' not in boxes[0][1] and not any('segmentation' in n for n in boxes.truth['annotations'])

def test_scoring_leaves_the_truth_as_it_is(coco):
    _, test = instance_data(coco, say=None)
    before = json.dumps(test.truth)
    coco_scores(test.truth, read_back(test, 'segm'), 'segm')
    assert json.dumps(test.truth)==before

# ---- keypoints

def people(k=17, first=1):
    points = [v for i in range(k) for v in (5+i%4, 6+i//4, 2 if i else 0)]
    notes = [dict(id=1, image_id=first, category_id=1, bbox=[2,3,10,10], iscrowd=0, area=80, keypoints=points, num_keypoints=k-1,
                  segmentation=[[2,3,12,3,12,13,2,13]]),
             dict(id=2, image_id=first+1, category_id=1, bbox=[2,3,6,4], iscrowd=0, area=24, keypoints=[0]*3*k, num_keypoints=0,
                  segmentation=[[2,3,8,3,8,7,2,7]])]
    names = ['nose', *(f'{s}_{n}' for n in 'eye ear shoulder elbow wrist hip knee ankle'.split() for s in ('left', 'right'))]
    return coco_json(first) | dict(annotations=notes, categories=[dict(id=1, name='person', keypoints=names[:k])])

def test_keypoints(coco):
    for part,first in (('train2017', 1), ('val2017', 11)): write(coco/f'annotations/person_keypoints_{part}.json', people(first=first))
    train, test = instance_data(coco, kinds=['keypoints'], say=None)
    assert test.classes==('person',) and [e['id'] for e in train.truth['images']]==[1]     # nothing labelled in the second
    assert test[0][1]['keypoints'].shape==(1,17,3) and test[0][1]['keypoints'][0,:2].tolist()==[[5.5,6.5,0],[6.5,6.5,2]]
    assert test[2][1]['keypoints'].shape==(0,17,3)
    assert AP_of_itself(test, 'keypoints')==1
    assert keypoint_pairs(test.keypoints)==((1,2),(3,4),(5,6),(7,8),(9,10),(11,12),(13,14),(15,16))
    both, _ = instance_data(coco, kinds=['masks', 'keypoints'], say=None)
    assert both[0][1]['masks'].sum()==100
    assert instance_data(coco, say=None)[0].classes==('car', 'dog')

# ---- panoptic

def test_panoptic(tmp_path):
    big = 1+256*2+65536*3                                            # a number of all three bytes
    numbers = np.zeros((16,20), int)
    numbers[2:6,3:9], numbers[8:12,3:9], numbers[0:2], numbers[13:16,10:14] = big, 7, 300, 9
    for part,first in (('train', 1), ('val', 11)):
        segments = [dict(id=big, category_id=18, iscrowd=0, bbox=[3,2,6,4], area=24), dict(id=7, category_id=3, iscrowd=1, bbox=[3,8,6,4], area=24),
                    dict(id=300, category_id=100, iscrowd=0, bbox=[0,0,20,2], area=40), dict(id=9, category_id=3, iscrowd=0, bbox=[10,13,4,3], area=12)]
        d = dict(images=coco_json(first)['images'][:1], annotations=[dict(image_id=first, file_name='a.png', segments_info=segments)],
                 categories=[c | dict(isthing=1) for c in CATEGORIES]+[dict(id=100, name='sky', isthing=0)])
        write(tmp_path/f'annotations/panoptic_{part}.json', d)
        color = np.stack([numbers%256, numbers//256%256, numbers//65536], -1).astype(np.uint8)
        (tmp_path/f'annotations/panoptic_{part}').mkdir()
        Image.fromarray(color).save(tmp_path/f'annotations/panoptic_{part}/a.png')
        photo(tmp_path/part/f'{first}.jpg')
    _, test = instance_data(tmp_path, say=None)
    target = test[0][1]
    assert test.classes==('car', 'dog') and 'coco-panoptic' in test.read_as
    assert target['boxes'].tolist()==[[3,2,9,6],[10,13,14,16]] and target['labels'].tolist()==[2,1]
    assert np.array_equal(target['masks'].numpy(), [numbers==big, numbers==9])
    assert [n['bbox'] for n in test.truth['annotations'] if n['iscrowd']]==[[3,8,6,4]]
    assert AP_of_itself(test)==AP_of_itself(test, 'segm')==1
    for f in (tmp_path/'annotations').glob('*/a.png'): f.unlink()    # boxes are in the json
    assert instance_data(tmp_path, kinds=(), say=None)[1][0][1]['boxes'].tolist()==[[3,2,9,6],[10,13,14,16]]

# ---- masks that number objects

def test_numbers_that_reach_around_a_column():
    "Column by column, a run of one number may go on at the head of the next column"
    numbers = np.array([[0,7,7],[5,7,0],[5,7,0]])
    notes = number_notes(numbers)
    assert {n: (o['bbox'], o['area']) for n,o in notes.items()}=={5: ([0,1,1,2], 2), 7: ([1,0,2,3], 4)}
    for n,o in notes.items(): assert np.array_equal(runs.decode(o['segmentation']), numbers==n)

# ---- Cityscapes

def city_numbers():
    numbers = np.full((40,60), 7)
    numbers[5:25,3:18], numbers[10:39,20:40], numbers[0:5,50:60], numbers[30:40,3:18] = 26000, 24012, 26, 33001
    numbers[12:16,8:12] = 7                                          # something in front of the car
    return numbers

@pytest.fixture
def city(tmp_path):
    for part,name in (('train', 'aachen_000000_000019'), ('val', 'ulm_000003_000019'), ('val', 'ulm_000004_000019')):
        town = name.split('_')[0]
        photo(tmp_path/f'leftImg8bit/{part}/{town}/{name}_leftImg8bit.png', (60,40))
        save_numbers(tmp_path/f'gtFine/{part}/{town}/{name}_gtFine_instanceIds.png', city_numbers(), np.uint16)
    photo(tmp_path/'leftImg8bit/test/bonn/bonn_000000_000019_leftImg8bit.png', (60,40))
    return tmp_path

def test_cityscapes(city):
    train, test = instance_data(city, say=None)
    assert (len(train), len(test))==(1, 2)
    assert test.classes==('person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle')
    target, numbers = test[0][1], city_numbers()
    assert [test.classes[k-1] for k in target['labels']]==['person', 'car', 'bicycle']
    assert target['boxes'].tolist()==[[20,10,40,39],[3,5,18,25],[3,30,18,40]]
    assert np.array_equal(target['masks'].numpy(), [numbers==n for n in (24012, 26000, 33001)])
    assert [(n['category_id'], n['bbox']) for n in test.truth['annotations'] if n['iscrowd']]==[(26, [50,0,10,5])]*2
    assert AP_of_itself(test)==AP_of_itself(test, 'segm')==1

def test_masks_are_decoded_once(city, monkeypatch):
    "What Cityscapes' files say is kept until one of them changes; a cache that is broken or cannot be written is none"
    def opened(): return instance_data(city, say=None)[1].truth
    file, decoded = next(city.glob('gtFine/val/*/*.png')), []
    was, read = opened(), layouts.read_mask
    monkeypatch.setattr(layouts, 'read_mask', lambda f: decoded.append(f) or read(f))
    assert opened()==was and not decoded
    save_numbers(file, np.where(city_numbers()==26000, 26001, city_numbers())[:,::-1], np.uint16)
    os.utime(file, (0, 0))
    new = opened()
    assert [p.name for p in decoded].count(file.name)==1 and new!=was and opened()==new and len(decoded)==2
    for f in Path(os.environ['DENSESSL_CACHE']).glob('cityscapes-*.json'): f.write_text('[')
    assert opened()==new and len(decoded)>2
    (city/'file').touch()
    monkeypatch.setenv('DENSESSL_CACHE', str(city/'file'))
    assert opened()==new

def test_cityscapes_own_scores(city):
    pytest.importorskip('cityscapesscripts')
    _, test = instance_data(city, say=None)
    said = read_back(test, 'segm')
    scores, by_class = cityscapes_scores(test, said)
    assert scores==pytest.approx(dict(AP=1, AP50=1)) and by_class['car']==pytest.approx(1)
    crowd = [dict(d, segmentation=encode_mask(city_numbers()==26), category_id=26, score=.99) for d in said[:1]]
    assert cityscapes_scores(test, said+crowd)[0]==pytest.approx(scores)     # a group adds nothing and takes nothing
    wrong = [dict(d, segmentation=encode_mask(rectangle(42,20,15,15,(40,60))), category_id=26, score=.99) for d in said[:1]]
    assert cityscapes_scores(test, said+wrong)[1]['car']<1

# ---- VOC

def voc_xml(*objects, size=(20,16)):
    def one(name, box, difficult):
        corners = ''.join(f'<{k}>{v}</{k}>' for k,v in zip(('xmin','ymin','xmax','ymax'), box))
        return (f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox><part><name>head</name>'
                f'<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>')
    return (f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>'
            f'{"".join(one(*o) for o in objects)}</annotation>')

@pytest.fixture
def voc(tmp_path):
    numbers = np.zeros((16,20), int)
    numbers[2:6,3:9], numbers[8:12,3:9], numbers[2,3:9] = 1, 2, 255  # a border that belongs to none
    for k in range(1, 5):
        photo(tmp_path/f'JPEGImages/2007_00000{k}.jpg')
        write(tmp_path/f'Annotations/2007_00000{k}.xml', voc_xml(('dog', (4,3,9,6), 0), ('cat', (4,9,9,12), 1)))
        if k<4: save_numbers(tmp_path/f'SegmentationObject/2007_00000{k}.png', numbers, palette=True)
    lists = tmp_path/'ImageSets'
    for where,train,val in (('Main', (1,2), (3,4)), ('Segmentation', (1,), (2,3))):
        for part,ids in (('train', train), ('val', val), ('trainval', train+val), ('dog_train', train)):
            write(lists/where/f'{part}.txt', ''.join(f'2007_00000{k}{"  1" if part=="dog_train" else ""}\n' for k in ids))
    return tmp_path

def test_voc_boxes(voc):
    train, test = instance_data(voc, kinds=(), say=None)
    assert [e['file_name'] for e in train.truth['images']]==['2007_000001.jpg', '2007_000002.jpg'] and len(test)==2
    assert len(test.classes)==20 and test.classes[7]=='cat' and test.classes[11]=='dog'
    target = test[0][1]                                              # pixels 4 to 9, counted from 1, are 6 wide
    assert target['boxes'].tolist()==[[3,2,9,6],[3,8,9,12]] and target['labels'].tolist()==[12,8]
    assert [n['difficult'] for n in test.truth['annotations']]==[0,1,0,1]
    assert AP_of_itself(test)==1 and voc_scores(test.truth, read_back(test, 'bbox'))[0]['VOC AP50']==1
    scores, by_class = voc_scores(test.truth, read_back(test, 'bbox'))
    assert np.isnan(by_class['cat']) and by_class['dog']==1           # all cats are difficult

def test_images_without_annotations_are_said(voc, city, uavdt):
    "All three are in one folder"
    (voc/'Annotations/2007_000004.xml').unlink()
    photo(city/'leftImg8bit/val/ulm/ulm_000009_000019_leftImg8bit.png', (60,40))
    write(uavdt/'M_attr/test/M0999_attr.txt', '')
    said = {k: instance_data(voc, kinds=(), layout=k, say=None)[1].read_as for k in ('voc', 'cityscapes', 'uavdt')}
    assert said['voc'].endswith('val: 1 image without annotations left out (2007_000004)')
    assert said['cityscapes'].endswith('val: 1 image without annotations left out (ulm_000009_000019_leftImg8bit.png)')
    assert said['uavdt'].endswith('test: the sequences M0999 are not there')

def test_voc_masks(voc):
    train, test = instance_data(voc, say=None)
    assert len(train)==1 and len(test)==2
    assert np.array_equal(test[0][1]['masks'].numpy(), [rectangle(3,3,6,3), rectangle(3,8,6,4)])
    assert test[0][1]['boxes'].tolist()==[[3,2,9,6],[3,8,9,12]]
    assert AP_of_itself(test, 'segm')==1 and voc_scores(test.truth, read_back(test, 'segm'), 'segm')[0]['VOC AP50']==1

def test_voc_of_own_classes(voc):
    for f in (voc/'Annotations').iterdir(): write(f, f.read_text().replace('cat', 'zebu').replace('<width>20</width>', ''))
    train, test = instance_data(voc, kinds=(), splits=('train', 'val'), say=None)
    assert train.classes==('dog', 'zebu') and train.truth['images'][0]['width']==20

# ---- UAVDT

@pytest.fixture
def uavdt(tmp_path):
    for s in ('M0101', 'M0203', 'M1401'):
        for k in (1,2): photo(tmp_path/f'UAV-benchmark-M/{s}/img{k:06d}.jpg')
        write(tmp_path/f'UAV-benchmark-MOTD_v1.0/GT/{s}_gt_whole.txt',
              '1,1,2,3,6,4,1,1,1\n1,2,10,8,5,6,1,1,3\n2,1,3,3,6,4,1,1,1\n2,9,15,10,9,9,1,1,2\n')
        write(tmp_path/f'UAV-benchmark-MOTD_v1.0/GT/{s}_gt_ignore.txt', '2,-1,0,0,20,2,-1,-1,-1\n')
    for part,s in (('train', 'M0101'), ('train', 'M0203'), ('test', 'M1401')): write(tmp_path/f'M_attr/{part}/{s}_attr.txt', '0,0\n')
    return tmp_path

def test_uavdt(uavdt):
    train, test = instance_data(uavdt, kinds=(), say=None)
    assert (len(train), len(test))==(4, 2) and test.classes==('vehicle',)
    assert [e['file_name'] for e in test.truth['images']]==['M1401/img000001.jpg', 'M1401/img000002.jpg']
    assert test[0][1]['boxes'].tolist()==[[2,3,8,7],[10,8,15,14]] and test[0][1]['labels'].tolist()==[1,1]
    assert test[1][1]['boxes'].tolist()==[[3,3,9,7],[15,10,20,16]]   # cut at the frame
    assert [n['bbox'] for n in test.truth['annotations'] if n['iscrowd']]==[[0,0,20,2]]
    assert AP_of_itself(test)==1 and voc_scores(test.truth, read_back(test, 'bbox'))[0]['VOC AP50']==1
    scores, _ = coco_scores(test.truth, read_back(test, 'bbox'), thresholds=(.5,.7))
    assert scores==dict(AP50=1, AP70=1)
    _, three = instance_data(uavdt, kinds=(), one_class=False, say=None)
    assert three.classes==('car', 'truck', 'bus') and three[0][1]['labels'].tolist()==[1,3]
    assert [n['bbox'] for n in three.truth['annotations'] if n['iscrowd']]==3*[[0,0,20,2]]      # ignored, whatever is said there

# ---- components

def test_components(tmp_path):
    labels = np.zeros((30,40), int)
    labels[2:8,2:8], labels[8:14,8:14], labels[20:26,2:8], labels[2:8,20:30], labels[28:30,38:40] = 1, 1, 1, 2, 1
    for part in ('train', 'val'):
        for k in range(2):
            photo(tmp_path/f'images/{part}/{part}{k}.png', (40,30))
            save_numbers(tmp_path/f'labels/{part}/{part}{k}.png', labels)
    with pytest.raises(InputError, match="components: any labelled folder .* only if asked for"): instance_data(tmp_path)
    _, test = instance_data(tmp_path, layout='components', say=None)
    target = test[0][1]
    assert target['boxes'].tolist()==[[2,2,14,14],[2,20,8,26],[20,2,30,8]]   # corners touch; 4 pixels are too few
    assert target['masks'].flatten(1).sum(1).tolist()==[72,36,60]
    assert [test.classes[k-1] for k in target['labels']]==['1', '1', '2']
    assert AP_of_itself(test, 'segm')==1
    assert instance_data(tmp_path, layout='components', classes=['2'], say=None)[1].classes==('2',)

# ---- images

def test_exif(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (3,5,3), dtype=np.uint8)
    for turn in range(1, 9):
        tag = Image.Exif()
        tag[0x0112] = turn
        Image.fromarray(pixels).save(tmp_path/f'{turn}.png', exif=tag)
        stored = read_image(tmp_path, dict(file_name=f'{turn}.png', width=5, height=3)).permute(1,2,0).numpy()
        assert turn in (2,3,4) or np.array_equal(stored, pixels), turn
        if turn>4: assert read_image(tmp_path, dict(file_name=f'{turn}.png', width=3, height=5)).shape==(3,5,3)

@pytest.mark.parametrize('method', ('fork', 'spawn'))
def test_loader_processes(coco, method):
    train, _ = instance_data(coco, say=None)
    again = pickle.loads(pickle.dumps(train))
    assert torch.equal(again[0][0], train[0][0])
    loader = DataLoader(train, None, num_workers=1, multiprocessing_context=method)
    for (image, target),(known, other) in zip(loader, train):
        assert torch.equal(image, known) and torch.equal(target['masks'], other['masks'])

# ---- VOC's rule

def voc_by_the_book(truth, said, category, least):
    "The devkit's loop over all detections of a class, the surest first"
    objects = defaultdict(list)
    for o in truth['annotations']:
        if o['category_id']==category: objects[o['image_id']].append(dict(o, taken=False))
    n = sum(not o['difficult'] for v in objects.values() for o in v)
    tp, fp = [], []
    for d in sorted((d for d in said if d['category_id']==category), key=lambda d: -d['score']):
        best, own = 0, None
        for o in objects[d['image_id']]:
            (ax, ay, aw, ah), (bx, by, bw, bh) = d['bbox'], o['bbox']
            w, h = min(ax+aw, bx+bw)-max(ax, bx), min(ay+ah, by+bh)-max(ay, by)
            if w>0 and h>0 and (iou := w*h/(aw*ah+bw*bh-w*h))>best: best, own = iou, o
        if best>=least and own['difficult']: continue
        hit = best>=least and not own['taken']
        if hit: own['taken'] = True
        tp.append(hit)
        fp.append(not hit)
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    recall, precision = np.r_[0, tp/n, 1], np.r_[0, tp/(tp+fp), 0]
    for i in range(len(precision)-2, -1, -1): precision[i] = max(precision[i], precision[i+1])
    return sum((recall[i+1]-recall[i])*precision[i+1] for i in range(len(recall)-1))

@pytest.mark.parametrize('least', (.5, .7))
def test_voc_rule(least):
    g, notes, said = np.random.default_rng(1), [], []
    for i in range(1, 31):
        for _ in range(g.integers(1, 7)):
            box = np.r_[g.uniform(0, 40, 2), g.uniform(10, 40, 2)]
            notes.append(dict(id=len(notes)+1, image_id=i, category_id=int(g.integers(1, 3)), bbox=box.tolist(), area=1., iscrowd=0,
                              difficult=int(g.random()<.2)))
            said += [dict(image_id=i, category_id=int(g.integers(1, 3)), bbox=(box+g.normal(0, 3, 4)).tolist(), score=float(g.random()))
                     for _ in range(g.integers(0, 4))]
    truth = dict(images=[dict(id=i) for i in range(1, 31)], annotations=notes, categories=[dict(id=1, name='a'), dict(id=2, name='b')])
    scores, by_class = voc_scores(truth, said, least=least)
    known = [voc_by_the_book(truth, said, k, least) for k in (1,2)]
    assert list(by_class.values())==pytest.approx(known, abs=1e-9) and scores[f'VOC AP{round(100*least)}']==pytest.approx(np.mean(known))
    assert .03<scores[f'VOC AP{round(100*least)}']<.95

# ---- bad input

def changed(f, change):
    d = json.loads(f.read_text())
    change(d)
    write(f, d)

COCO_ERRORS = {
    'has no list': lambda d: d.pop('images'),
    'two images with the id 1:': lambda d: d['images'][1].update(id=1),
    'two categories with the same id': lambda d: d['categories'][1].update(id=3),
    'annotation 1 of image 1 has the category 5, which is not in the list': lambda d: d['annotations'][1].update(category_id=5),
    'belongs to no image in the list': lambda d: d['annotations'][1].update(image_id=77),
    r'has the box \[18, 1, 6, 5\], most of which is outside its image of 20 x 16': lambda d: d['annotations'][1].update(bbox=[18,1,6,5]),
    r'has the box \[1, 2, 3\]: give left': lambda d: d['annotations'][1].update(bbox=[1,2,3]),
    'has the box None': lambda d: d['annotations'][1].pop('bbox'),
    r'has the box \[nan, 1, 2, 3\]': lambda d: d['annotations'][1].update(bbox=[float('nan'),1,2,3]),
    'has a mask of 20 x 15, its image is 20 x 16': lambda d: d['annotations'][1]['segmentation'].update(size=[15,20]),
    'has run lengths of 3 pixels, its image of 20 x 16 has 320': lambda d: d['annotations'][1]['segmentation'].update(counts=[1,2]),
    'no list of polygons': lambda d: d['annotations'][0].update(segmentation=[2,3,8,3,8,7]),
    'holds no object': lambda d: d['annotations'].clear(),
    'holds no object to learn from': lambda d: [n.update(iscrowd=1) for n in d['annotations']],
    'holds no masks: pass kinds=': lambda d: [n.pop('segmentation') for n in d['annotations']],
    "not laid out as COCO: KeyError 'height'": lambda d: d['images'][0].pop('height'),
    "train2017 and val2017 of .* have different lists of classes, as 'cow'": lambda d: d['categories'].append(dict(id=90, name='cow')),
    '1 of 3 images of .* are not in .*train2017, as nowhere.jpg: add them, or pass skip_missing=True': lambda d: d['images'][0].update(file_name='nowhere.jpg'),
}

@pytest.mark.parametrize('says', COCO_ERRORS)
def test_a_json_that_does_not_fit(coco, says):
    changed(coco/'annotations/instances_train2017.json', COCO_ERRORS[says])
    with pytest.raises(InputError, match=says) as e: instance_data(coco, say=None)
    assert '\n' not in str(e.value)

def test_missing_images_can_be_left_out(coco):
    (coco/'val2017/11.jpg').unlink()
    _, test = instance_data(coco, skip_missing=True, say=None)
    assert len(test)==2 and 'val2017: 1 image not there and left out' in test.read_as

def test_bad_images(coco):
    train, _ = instance_data(coco, say=None)
    photo(coco/'train2017/1.jpg', (30,16))
    with pytest.raises(InputError, match='1.jpg has 30 x 16 pixels, its annotations are for an image of 20 x 16'): train[0]
    (coco/'train2017/1.jpg').write_bytes(b'broken')
    with pytest.raises(InputError, match='1.jpg.* cannot be read as a photograph'): train[0]
    (coco/'train2017/1.jpg').unlink()
    with pytest.raises(InputError, match='1.jpg.* no such file'): train[0]

def test_bad_calls(coco, tmp_path_factory):
    for says,kwargs in {"got 'points'": dict(kinds=['points']), 'holds no keypoints': dict(kinds=['keypoints']), "no class 'cow'": dict(classes=['cow']),
                        'limit must be': dict(limit=0), "there is no layout 'city'": dict(layout='city'), 'not laid out as images .voc:': dict(layout='voc'),
                        'but not test': dict(splits=['train2017', 'test']), 'two different parts': dict(splits=['val2017', 'val2017']),
                        "is for layout='components'": dict(divisor=3)}.items():
        with pytest.raises(InputError, match=says.replace('images .voc', r'images with objects \(voc')): instance_data(coco, say=None, **kwargs)
    with pytest.raises(InputError, match='is not a folder'): instance_data(coco/'none')
    empty = tmp_path_factory.mktemp('empty')
    with pytest.raises(InputError, match='it holds nothing') as e: instance_data(empty)
    assert all(k in str(e.value) for k in INSTANCE_LAYOUTS)          # says what was looked for
    write(coco/'annotations/instances_train2014.json', coco_json())
    with pytest.raises(InputError, match='has the parts train2014, train2017, val2017: pass splits'): instance_data(coco)

def test_two_layouts(coco, voc):
    "Both are in one folder"
    with pytest.raises(InputError, match="read as coco-instances and as voc: pass layout='coco-instances'"): instance_data(coco)
    assert len(instance_data(coco, layout='voc', say=None)[0])==1 and len(instance_data(coco, layout='coco-instances', say=None)[0])==2

def test_the_same_image_in_both_parts(coco):
    changed(coco/'annotations/instances_val2017.json', lambda d: [e.update(file_name=f'../train2017/{k+1}.jpg') for k,e in enumerate(d['images'])])
    changed(coco/'annotations/instances_train2017.json', lambda d: [e.update(file_name=f'../train2017/{k+1}.jpg') for k,e in enumerate(d['images'])])
    write(coco/'images/x/y.txt', '')
    with pytest.raises(InputError, match='are in both train2017 and val2017'): instance_data(coco, images='images')

def test_bad_files_of_other_layouts(voc, uavdt, tmp_path):
    only = lambda layout: instance_data(tmp_path, layout=layout, kinds=('masks',) if layout=='voc' else (), say=None)
    table = tmp_path/'UAV-benchmark-MOTD_v1.0/GT/M0101_gt_whole.txt'
    write(table, '1,1,2,3,6,4,1,1,8\n')
    with pytest.raises(InputError, match='M0101_gt_whole.txt has the class 8'): only('uavdt')
    write(table, '1,1,2\n')
    with pytest.raises(InputError, match='no table of 9 numbers a line'): only('uavdt')
    table.unlink()
    with pytest.raises(InputError, match='M0101_gt_whole.txt is not there'): only('uavdt')
    with pytest.raises(InputError, match='UAVDT, which holds no masks'): instance_data(tmp_path, layout='uavdt')
    write(tmp_path/'Annotations/2007_000001.xml', voc_xml(('dog', (4,3,9,6), 0)))
    with pytest.raises(InputError, match='2007_000001.png holds the object 2, its xml file has only 1 object'): only('voc')
    write(tmp_path/'Annotations/2007_000001.xml', voc_xml(size=(21,16)))
    with pytest.raises(InputError, match='2007_000001.png has 20 x 16 pixels, its image 21 x 16'): only('voc')
    write(tmp_path/'Annotations/2007_000001.xml', '<annotation><object>')
    with pytest.raises(InputError, match='2007_000001.xml is no xml file of VOC'): only('voc')
