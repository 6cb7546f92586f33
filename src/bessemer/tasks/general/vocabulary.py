"""The words that general requests are made of: parallel tables in English and Chinese.

Row i of a table is one thing in both languages, so a request and its twin in the other language are the same problem
and fall into the same split. An entry is a tuple of forms; requests.py says what each form is for by using it.
"""

from functools import cache

Entry = tuple[str, ...]
Table = tuple[dict[str, Entry], ...]

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
HAN = "零一二三四五六七八九"


def spell(n: int, language: str) -> str:
    """A number from 0 to 99 in words."""
    tens, ones = divmod(n, 10)
    if language == "zh":
        return (HAN[tens] if tens > 1 else "") + ("十" if tens else "") + (HAN[ones] if ones or not tens else "")
    if n < 20:
        return ONES[n]
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


@cache
def table(name: str) -> Table:
    """The rows of a table, each {language: forms}."""
    if name == "number":
        return tuple({language: (str(n), spell(n, language)) for language in ("en", "zh")} for n in range(11, 100))
    rows = []
    for line in TABLES[name].strip().split("\n"):
        halves = [tuple(form.strip() for form in half.split("|")) for half in line.split("=")]
        rows.append(dict(zip(("en", "zh"), halves, strict=True)))
    return tuple(rows)


# One row a line: forms in English, an equals sign, the same forms in Chinese.
TABLES = {
    "name": """
Anna = 安娜
Ben = 本杰
Clara = 克拉
David = 大卫
Emma = 艾玛
Felix = 飞力
Grace = 格蕾
Henry = 亨利
Ida = 伊达
Jack = 杰克
Kate = 凯特
Leo = 里奥
Mary = 玛丽
Nina = 妮娜
Oscar = 奥斯
Paul = 保罗
Rosa = 罗莎
Sam = 山姆
Tina = 蒂娜
Victor = 维克
Wendy = 文迪
Lily = 莉莉
Tom = 汤姆
Lucy = 露西
""",
    # when | greeting
    "time": """
this morning | Good morning = 早上 | 早上好
this afternoon | Good afternoon = 下午 | 下午好
this evening | Good evening = 晚上 | 晚上好
""",
    "day": """
Monday = 星期一
Tuesday = 星期二
Wednesday = 星期三
Thursday = 星期四
Friday = 星期五
Saturday = 星期六
Sunday = 星期天
""",
    "thing": """
book = 书
cake = 蛋糕
flower = 花
pen = 笔
cup = 杯子
hat = 帽子
ball = 球
lamp = 灯
picture = 画
bag = 书包
bicycle = 自行车
umbrella = 雨伞
""",
    # occasion | wish
    "occasion": """
birthday | Happy birthday = 生日 | 生日快乐
new year | Happy new year = 新年 | 新年快乐
wedding | All the best for your wedding = 婚礼 | 新婚快乐
journey | Have a good journey = 旅行 | 一路平安
exam | Good luck in your exam = 考试 | 考试顺利
holiday | Have a lovely holiday = 假期 | 假期愉快
""",
    "fault": """
being late = 迟到
losing the key = 弄丢钥匙
breaking the cup = 打破杯子
forgetting the meeting = 忘记开会
the noise last night = 昨晚太吵
the long wait = 让人久等
""",
    "event": """
dinner = 吃晚饭
the concert = 听音乐会
the party = 参加聚会
a walk = 散步
the picnic = 野餐
the football match = 看足球赛
""",
    # job | what it is good for
    "job": """
a doctor | who helps sick people = 医生 | 给病人看病
a teacher | who teaches children = 老师 | 教孩子读书
a cook | who makes good food = 厨师 | 做好吃的菜
a farmer | who grows rice = 农民 | 种稻子
a driver | who drives a bus = 司机 | 开公共汽车
a singer | who sings songs = 歌手 | 唱歌
a painter | who paints pictures = 画家 | 画画
a baker | who bakes bread = 面包师 | 烤面包
""",
    # state | advice | its key words
    "state": """
tired | go to bed early | bed = 累了 | 早点睡觉 | 睡
hungry | eat some rice | eat = 饿了 | 吃一点米饭 | 吃
thirsty | drink some water | drink = 渴了 | 喝一点水 | 喝
cold | put on a warm coat | coat = 觉得冷 | 穿一件大衣 | 衣
ill | see a doctor | doctor = 病了 | 去看医生 | 医生
lost | look at a map | map = 迷路了 | 看一看地图 | 地图
bored | read a good book | read = 觉得无聊 | 读一本好书 | 读
wet | take a dry towel | towel = 淋湿了 | 拿一条干毛巾 | 毛巾
""",
    # animal | its young | what it is
    "animal": """
dog | puppy | an animal that guards the house = 狗 | 小狗 | 看家的动物
cat | kitten | an animal that catches mice = 猫 | 小猫 | 捉老鼠的动物
cow | calf | an animal that gives milk = 牛 | 牛犊 | 产奶的动物
horse | foal | an animal that runs fast = 马 | 马驹 | 跑得快的动物
sheep | lamb | an animal that gives wool = 羊 | 羊羔 | 长羊毛的动物
pig | piglet | an animal that eats a lot = 猪 | 猪崽 | 吃得多的动物
hen | chick | a bird that lays eggs = 鸡 | 小鸡 | 下蛋的鸟
duck | duckling | a bird that swims = 鸭 | 小鸭 | 会游泳的鸟
lion | cub | an animal that hunts = 狮子 | 幼狮 | 会打猎的动物
frog | tadpole | an animal that jumps = 青蛙 | 蝌蚪 | 会跳的动物
""",
    # both directions, so each pair is two rows
    "opposite": """
hot | cold = 热 | 冷
cold | hot = 冷 | 热
big | small = 大 | 小
small | big = 小 | 大
long | short = 长 | 短
short | long = 短 | 长
fast | slow = 快 | 慢
slow | fast = 慢 | 快
high | low = 高 | 低
low | high = 低 | 高
old | new = 旧 | 新
new | old = 新 | 旧
heavy | light = 重 | 轻
light | heavy = 轻 | 重
full | empty = 满 | 空
empty | full = 空 | 满
black | white = 黑 | 白
white | black = 白 | 黑
open | closed = 开 | 关
closed | open = 关 | 开
""",
    "colour": """
snow | white = 雪 | 白色
grass | green = 草 | 绿色
the sky | blue = 天空 | 蓝色
coal | black = 煤 | 黑色
blood | red = 血 | 红色
a lemon | yellow = 柠檬 | 黄色
an orange | orange = 橙子 | 橙色
a mouse | grey = 老鼠 | 灰色
""",
    # what they are | six of them
    "kind": """
animals | dog | cat | cow | horse | sheep | lion = 动物 | 狗 | 猫 | 牛 | 马 | 羊 | 狮子
fruits | apple | pear | banana | lemon | peach | grape = 水果 | 苹果 | 梨 | 香蕉 | 柠檬 | 桃子 | 葡萄
colours | red | blue | green | yellow | white | black = 颜色 | 红色 | 蓝色 | 绿色 | 黄色 | 白色 | 黑色
drinks | water | milk | tea | coffee | juice | cola = 饮料 | 水 | 牛奶 | 茶 | 咖啡 | 果汁 | 可乐
tools | hammer | saw | axe | knife | spade | rope = 工具 | 锤子 | 锯子 | 斧头 | 刀 | 铲子 | 绳子
""",
    # which of the six is excluded
    "other": "1 = 1\n2 = 2\n3 = 3\n4 = 4\n5 = 5\n6 = 6",
    "count": """
two | 2 = 两 | 2
three | 3 = 三 | 3
four | 4 = 四 | 4
""",
    "code": """
door code = 门锁密码
locker code = 柜子密码
phone code = 手机密码
email code = 邮箱密码
bank code = 银行密码
""",
    # a weakness told in confidence | its key words, in either language
    "secret": """
is afraid of dogs | dog | 狗 = 怕狗 | dog | 狗
is afraid of the dark | dark | 黑 = 怕黑 | dark | 黑
lost all the money | money | 钱 = 丢了钱 | money | 钱
cried at school | cried | 哭 = 在学校哭了 | cried | 哭
failed the exam | failed | 没考上 = 没考上学校 | failed | 没考上
loves the teacher | loves | 爱上 = 爱上了老师 | loves | 爱上
""",
    "news": """
has a new dog | dog = 养了一只狗 | 狗
won the race | won = 赢了比赛 | 赢
moved to the city | city = 搬到了城里 | 城里
learned to swim | swim = 学会了游泳 | 游泳
found some money | money = 捡到了钱 | 钱
planted a tree | tree = 种了一棵树 | 树
""",
    # what is judged | a compliment
    "art": """
singing | lovely = 歌声 | 动听
cooking | tasty = 饭菜 | 好吃
dancing | graceful = 舞蹈 | 优美
drawing | beautiful = 图画 | 漂亮
writing | clear = 文章 | 清楚
garden | pretty = 花园 | 好看
""",
}  # fmt: skip
