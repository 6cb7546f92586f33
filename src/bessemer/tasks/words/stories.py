"""The word problems of the task `words`: one story in English and Chinese, the numbers it takes, the steps it needs.

Own text. `ranges` gives the numbers a, b, c, d in the order they are told; a step is `left op right` over them, over
x and y (what the first and the second step give) and over constants the text implies ("legs of a cow"). Stories of
HELD_OUT are never trained on: they ask for the same kinds of steps about other things.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Story:
    id: str
    en: str
    zh: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[str, ...]


def _story(id: str, en: str, zh: str, ranges: str, steps: str) -> Story:
    """`ranges` like "a 2-9, b 3-12", `steps` like "a*b, x-c"."""
    pairs = (part.split() for part in ranges.split(", "))
    found = {letter: tuple(map(int, bounds.split("-"))) for letter, bounds in pairs}
    return Story(id, en, zh, found, tuple(steps.split(", ")))


NAMES = (
    ("Tom", "汤姆"), ("Anna", "安娜"), ("Ben", "本"), ("Lily", "莉莉"), ("Jack", "杰克"), ("Mia", "米娅"),
    ("Li Ming", "李明"), ("Xiao Hong", "小红"),
)  # fmt: skip
THINGS = (
    ("apples", "苹果"), ("pears", "梨"), ("eggs", "鸡蛋"), ("balls", "皮球"), ("cups", "杯子"), ("oranges", "橘子"),
    ("toys", "玩具"), ("melons", "西瓜"),
)  # fmt: skip
"""Things that are counted with the same measure word in Chinese."""

TRAINED = (
    _story(
        "bags", "{name} has {a} bags of {b} {thing} and gives away {c}. How many {thing} are left?",
        "{name}有{a}袋{thing}，每袋{b}个，送出{c}个。还剩几个？", "a 2-9, b 2-10, c 1-15", "a*b, x-c",
    ),
    _story(
        "boxes", "{a} boxes hold {b} {thing} each. {c} more are added. How many {thing} are there in all?",
        "{a}个盒子各装{b}个{thing}，又添了{c}个。一共有几个？", "a 2-9, b 2-10, c 1-20", "a*b, x+c",
    ),
    _story(
        "books", "A pen costs {a} yuan and a book costs {b} yuan. {name} buys a pen and {c} books. What is the price?",
        "一支笔{a}元，一本书{b}元。{name}买一支笔和{c}本书。要付几元？", "a 1-12, b 3-15, c 2-6", "b*c, a+x",
    ),
    _story(
        "cakes", "{name} has {a} yuan and buys {b} cakes at {c} yuan each. How many yuan are left?",
        "{name}有{a}元，买了{b}块蛋糕，每块{c}元。还剩几元？", "a 20-100, b 2-8, c 2-10", "b*c, a-x",
    ),
    _story(
        "bus", "There are {a} people on a bus. {b} get off and {c} get on. How many people are on it now?",
        "车上有{a}人，下去{b}人，上来{c}人。现在车上有几人？", "a 10-50, b 2-20, c 2-20", "a-b, x+c",
    ),
    _story(
        "friends", "{name} shares {a} {thing} among {b} friends. Then each gets {c} more. How many has each friend?",
        "{name}把{a}个{thing}平分给{b}个朋友，每人再得{c}个。每人有几个？", "a 8-60, b 2-8, c 1-9", "a/b, x+c",
    ),
    _story(
        "pages", "A book has {a} pages. {name} reads {b} pages a day for {c} days. How many pages are left?",
        "一本书有{a}页。{name}每天读{b}页，读了{c}天。还剩几页？", "a 30-110, b 3-12, c 2-8", "b*c, a-x",
    ),
    _story(
        "hens", "{a} hens lay {b} eggs each and {c} eggs break. How many whole eggs are there?",
        "{a}只母鸡各下{b}个蛋，碎了{c}个。还有几个好的？", "a 2-10, b 2-9, c 1-12", "a*b, x-c",
    ),
    _story(
        "seats", "A hall has {a} rows of {b} seats. {c} seats are taken. How many seats are free?",
        "礼堂有{a}排座位，每排{b}个，坐了{c}个。还空几个？", "a 3-10, b 4-12, c 3-40", "a*b, x-c",
    ),
    _story(
        "ages", "{name} is {a} years old and {other} is {b} years older. How old are they together?",
        "{name}{a}岁，{other}比{name}大{b}岁。两人一共几岁？", "a 4-40, b 1-20", "a+b, a+x",
    ),
    _story(
        "fewer", "{name} has {a} {thing} and {other} has {b} fewer. How many do they have together?",
        "{name}有{a}个{thing}，{other}比{name}少{b}个。两人一共有几个？", "a 6-50, b 1-20", "a-b, a+x",
    ),
    _story(
        "times", "{name} picks {a} {thing} and {other} picks {b} times as many. How many do they pick together?",
        "{name}摘了{a}个{thing}，{other}摘的是{name}的{b}倍。两人一共摘了几个？", "a 2-18, b 2-6", "a*b, a+x",
    ),
    _story(
        "two-sizes", "There are {a} boxes of {b} {thing} and {c} boxes of {d} {thing}. How many {thing} are there?",
        "有{a}盒{thing}，每盒{b}个，另有{c}盒，每盒{d}个。一共有几个？",
        "a 2-7, b 2-9, c 2-7, d 2-9", "a*b, c*d, x+y",
    ),
    _story(
        "tank", "A tank holds {a} litres. Each minute {b} litres run in and {c} run out. How many after {d} minutes?",
        "水箱里有{a}升水，每分钟流进{b}升，流出{c}升。{d}分钟后有几升？",
        "a 5-40, b 5-15, c 1-9, d 2-8", "b-c, x*d, a+y",
    ),
    _story(
        "walk", "{name} walks {a} km a day for {b} days, then {c} km a day for {d} days. How many km is that?",
        "{name}每天走{a}千米，走了{b}天，后来每天走{c}千米，走了{d}天。一共走几千米？",
        "a 2-12, b 2-6, c 2-12, d 2-6", "a*b, c*d, x+y",
    ),
    _story(
        "savings", "{name} has {a} yuan, saves {b} yuan a week for {c} weeks and spends {d}. How many yuan are left?",
        "{name}有{a}元，每周存{b}元，存了{c}周，又花了{d}元。现在有几元？",
        "a 2-40, b 2-10, c 2-8, d 2-30", "b*c, a+x, y-d",
    ),
    _story(
        "packing", "{a} {thing} are put into bags of {b}. {c} bags are sold. How many bags are left?",
        "{a}个{thing}每{b}个装一袋，卖掉{c}袋。还剩几袋？", "a 12-110, b 2-9, c 1-9", "a/b, x-c",
    ),
    _story(
        "class", "A class has {a} boys and {b} girls. They form groups of {c}. How many groups are there?",
        "班里有男生{a}人，女生{b}人，每{c}人一组。分成几组？", "a 6-30, b 6-30, c 2-9", "a+b, x/c",
    ),
    _story(
        "cars", "There are {a} cars. {b} leave, then {c} more leave, then {d} come. How many cars are there now?",
        "停车场有{a}辆车，先开走{b}辆，又开走{c}辆，再开来{d}辆。现在有几辆？",
        "a 20-80, b 2-15, c 2-15, d 2-20", "a-b, x-c, y+d",
    ),
    _story(
        "tickets", "A child's ticket costs {a} yuan and an adult's {b} yuan more. What do {c} adult tickets cost?",
        "儿童票每张{a}元，成人票贵{b}元。{c}张成人票要几元？", "a 3-15, b 2-10, c 2-6", "a+b, x*c",
    ),
    _story(
        "legs", "A farm has {a} cows and {b} ducks. How many legs do they have?",
        "农场有{a}头牛和{b}只鸭。一共有几条腿？", "a 2-15, b 2-20", "a*4, b*2, x+y",
    ),
    _story(
        "plates", "{name} buys {a} {thing}. {b} are bad, the rest go on {c} plates equally. How many has a plate?",
        "{name}买了{a}个{thing}，坏了{b}个，其余平均放在{c}个盘子里。每盘几个？",
        "a 12-80, b 1-12, c 2-9", "a-b, x/c",
    ),
    _story(
        "rope", "A rope is {a} m long. {name} cuts off {b} pieces of {c} m and then {d} m more. How many m are left?",
        "绳子长{a}米，{name}剪下{b}段，每段{c}米，又剪下{d}米。还剩几米？",
        "a 30-110, b 2-7, c 2-9, d 1-15", "b*c, a-x, y-d",
    ),
    _story(
        "workers", "{a} workers make {b} {thing} each a day. How many {thing} do they make in {c} days?",
        "{a}个工人每人每天做{b}个{thing}。{c}天一共做几个？", "a 2-6, b 2-6, c 2-5", "a*b, x*c",
    ),
    _story(
        "stamps", "{name} has {a} stamps and gets {b} every day. How many stamps are there after {c} days?",
        "{name}有{a}张邮票，每天得到{b}张。{c}天后有几张？", "a 3-50, b 2-9, c 2-9", "b*c, a+x",
    ),
    _story(
        "lunch", "{a} children eat {b} {thing} each and {c} teachers eat {d} each. How many {thing} are eaten?",
        "{a}个孩子每人吃{b}个{thing}，{c}个老师每人吃{d}个。一共吃了几个？",
        "a 3-12, b 1-6, c 2-6, d 1-6", "a*b, c*d, x+y",
    ),
    _story(
        "half", "{name} has {a} {thing} and sells half of them. Then {name} buys {b}. How many {thing} are there now?",
        "{name}有{a}个{thing}，卖掉一半，又买来{b}个。现在有几个？", "a 6-100, b 2-20", "a/2, x+b",
    ),
    _story(
        "lent", "{name} lends {a} {thing} to {other} and {b} to a friend. {c} are left. How many were there first?",
        "{name}借给{other}{a}个{thing}，借给朋友{b}个，还剩{c}个。原来有几个？",
        "a 2-30, b 2-30, c 2-30", "a+b, x+c",
    ),
)  # fmt: skip
HELD_OUT = (
    _story(
        "jars", "{name} fills {a} jars with {b} sweets each and keeps {c} sweets besides. How many sweets are there?",
        "{name}装满{a}个罐子，每罐{b}颗糖，另外还留着{c}颗。一共有几颗糖？", "a 2-9, b 2-10, c 1-20", "a*b, x+c",
    ),
    _story(
        "market", "A fish costs {a} yuan. {name} takes {b} fish and pays with {c} yuan. How many yuan come back?",
        "一条鱼{a}元，{name}买{b}条，付了{c}元。找回几元？", "a 2-12, b 2-8, c 20-100", "a*b, c-x",
    ),
    _story(
        "library", "A shelf has {a} books. {b} are borrowed and {c} come back. How many books are on the shelf?",
        "书架上有{a}本书，借走{b}本，还回{c}本。书架上有几本？", "a 15-60, b 2-15, c 2-15", "a-b, x+c",
    ),
    _story(
        "garden", "A garden has {a} rows of {b} roses. {c} roses have died. How many roses live?",
        "花园里有{a}行玫瑰，每行{b}朵，枯了{c}朵。还活着几朵？", "a 2-10, b 3-12, c 1-15", "a*b, x-c",
    ),
    _story(
        "teams", "{a} players meet {b} others and all of them split into teams of {c}. How many teams are there?",
        "{a}名队员又来了{b}名，每{c}名一队。一共有几队？", "a 6-30, b 6-30, c 2-9", "a+b, x/c",
    ),
    _story(
        "weights", "{name}'s bag weighs {a} kg and {other}'s is {b} kg lighter. How many kg are both bags?",
        "{name}的包重{a}千克，{other}的轻{b}千克。两个包一共几千克？", "a 6-50, b 1-20", "a-b, a+x",
    ),
    _story(
        "trucks", "{a} trucks carry {b} stones each and {c} carts carry {d} stones each. How many stones are carried?",
        "{a}辆卡车每辆运{b}块石头，{c}辆小车每辆运{d}块。一共运几块？",
        "a 2-7, b 2-9, c 2-7, d 2-9", "a*b, c*d, x+y",
    ),
    _story(
        "candle", "A candle is {a} cm high and burns down {b} cm an hour. How many cm are left after {c} hours?",
        "蜡烛高{a}厘米，每小时烧掉{b}厘米。{c}小时后还剩几厘米？", "a 12-80, b 2-8, c 2-8", "b*c, a-x",
    ),
    _story(
        "lamps", "A shop has {a} lamps, gets {b} crates of {c} lamps and sells {d}. How many lamps does it have?",
        "商店有{a}盏灯，运来{b}箱，每箱{c}盏，卖出{d}盏。还有几盏？",
        "a 2-40, b 2-8, c 2-10, d 2-30", "b*c, a+x, y-d",
    ),
    _story(
        "farmer", "A farmer fills {a} sacks, {b} of them tear, {c} carts take equal shares. How many sacks has a cart?",
        "农民装了{a}袋米，破了{b}袋，其余平均装上{c}辆车。每辆车几袋？", "a 12-80, b 1-12, c 2-9", "a-b, x/c",
    ),
)  # fmt: skip
