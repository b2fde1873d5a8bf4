"""The built-in words that needle keys are made of: short, common, distinct; every pair `adjective-noun` is a key."""

_ADJECTIVES = """
amber ancient azure bitter bold brave bright brisk broad bronze calm clever cloudy cold copper coral cosmic crimson crisp curious
dapper daring deep distant dusty eager early earnest elastic elegant emerald fading faint famous fierce flying fresh frosty gentle giant
gilded gleaming golden grand grassy hasty hidden hollow honest humble icy idle ivory jolly keen lively lonely lucky mellow mighty
misty modern narrow nimble noble northern orange pale patient plain polished proud purple quick quiet rapid rare royal rugged rustic
salty scarlet secret silent silver simple sleepy slender smooth snowy solid southern steady stormy sunny swift tender tidy velvet
violet vivid wandering warm western wild windy wise wooden yellow young
"""
_NOUNS = """
acorn anchor apple arrow badger bakery bamboo banner barrel basket beacon beaver bell blanket bottle bridge bucket button cabin camel
candle canoe canyon castle cedar chimney circus citadel cliff clover comet compass cottage cricket crystal dagger daisy desert diamond
dolphin donkey dragon eagle ember engine falcon feather fiddle forest fountain fox galaxy garden glacier goblet hammer harbor harvest
hawk hedge helmet heron island jacket jaguar jungle kettle kitten ladder lagoon lantern lemon lizard magnet maple marble meadow mirror
monkey mountain needle oasis ocean orchard otter owl paddle panther parrot pebble pelican pepper pilot piano planet pocket prairie
pumpkin puzzle rabbit raven reef ribbon river rocket saddle sailor salmon shovel spider sparrow stable summit temple thunder tiger
tower tractor trumpet tulip tunnel turtle valley village violin volcano wagon walnut walrus whistle willow window wizard zebra
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
