-- constants.lua: names for every letter, code and size that more than one file uses.
--
-- Gives   names alone: the loader writes the values into the script where the names are used, and this file
--         vanishes, since a variable that functions share costs each call. byte('X') stands for the letter's code.
-- Needs   nothing. `letters.py` has the same letters, `packing.py` the same sizes

-- Kinds of operations
local ACQUIRE = byte('A')
local PEEK = byte('P')
local ACQUIRE_AGAIN = byte('O')
local TAKE_AHEAD = byte('T')
local FINISH = byte('F')
local RENEW = byte('N')
local SETTLE = byte('S')
local HOLD = byte('K')
local DELETE = byte('D')
local METER = byte('M')
local ACQUIRE_OWN = byte('a') -- with a cost of its own for each limit, as those that follow
local PEEK_OWN = byte('p')
local ACQUIRE_AGAIN_OWN = byte('o')
local OWN_COSTS = 97 -- the letters from here on

-- Kinds of limits
local WINDOW = byte('W')
local SLOTS = byte('C')
local BUDGET = byte('B')

-- Flags of a batch: in which no two charges share a key, and none has a budget; and any other
local DISJOINT = byte('D')
local SHARED = byte('S')
local DISJOINT_SPREAD = byte('d') -- such batches where the keys lie in several hash slots
local SHARED_SPREAD = byte('s')
local FLAGS_SIZE = 9 -- of the flag and a time

-- Modes of a finish: what becomes of the estimate
local MONEY_UNTOUCHED = 0
local MONEY_KEEP = 1
local MONEY_GIVE_BACK = 2

-- Modes of a meter's operation
local UNITS_SETTLE = 0
local UNITS_REPLACE = 1
local UNITS_HOLD = 2 -- until they are settled
local UNITS_KEEP = 3 -- the request has ended: the estimate is what it has used
local UNITS_GIVE_BACK = 4

-- What has become of an estimate that is neither open nor in a record
local HAS_LAPSED = 0 -- and was given back
local WAS_SETTLED = 1 -- in an operation whose answer was lost, unless somebody noted that it lapsed
local IS_OVER = 2 -- kept or given back by the end of its lease

-- Answers
local FAILED = 'E' -- and a sentence
local LATE = 'LATE' -- the sentence of an operation that came after it was given up
local DONE = '\1'
local REFUSED = 0
local ADMITTED = 1
local OTHER_PERIOD = '\2'

local UNKNOWN = '\0' -- of a settle: there is no record
local SETTLED = '\1'
local REPEATED = '\2'
local DIFFERENT = '\3'

-- Sizes of what operations are packed in: a charge, a finish and a settle up to what varies in number
local CHARGE_HEAD = 26
local FINISH_HEAD = 19
local SETTLE_HEAD = 11
local REPLACE_AT = 10 -- the offset where a settle says whether it replaces another
local LIMIT_SIZE = 25
local OWN_HEAD = 20 -- of a charge whose limits have costs of their own
local OWN_SIZE = 34 -- of such a limit
local OWN_LIMIT = '<BddddB' -- how it is packed
local METER_SIZE = 16 -- of each meter behind the limits
local ID_SIZE = 16

-- A meter's operation up to its first meter; more entries than a window has, where what was used is what was estimated
-- at most
local METER_HEAD = 5
local MODE_AT = 3
local METER_FIXED = 33 -- of each meter, up to its windows: four numbers, and how many windows it has
local METER_WINDOW = 24 -- of each of these
local MANY_ENTRIES = 1002
local CLOSED_SIZE = 40 -- of each estimate that close.lua is told to close

-- A record of units (meters.lua): its head, an entry, and as arguments the offsets where it says
-- whether its estimates may lapse, and of its first entry; an estimate as the set of its meter has it (estimates.lua)
local UNITS_HEAD = 16
local UNITS_ENTRY = 24
local HOLDS_AT = '8'
local FIRST_ENTRY = '16'
local MEMBER = '<c0dd'
local MEMBER_SIZE = 32
local KEEPS_SET = '' -- a member that never lapses: to make the set anew for each estimate would cost more

-- Parts of the script that are made when they are needed (parts.lua), beside those that are an operation's letter
local UPKEEP = 1
local REPAIR = 2
local SHARING = 3
local MONEY = 4
local ESTIMATES = 5

-- Bounds
local KEPT_FOR = 86400000 -- a day in milliseconds: how long beyond its windows a record of units waits to be settled
local MOST_COST = 4294967295 -- what entries hold exactly, and what doubles do
local MOST_MONEY = 9007199254740992
local KEPT_AFTER_END = 172800000000 -- two days in microseconds: how long after its end a period can be settled

-- How a window is stored: its header; with the stage behind it; with one more entry on that
local HEADER = '<ddddI4I4I2I2I2I2'
local WITH_STAGE = '<ddddI4I4I2I2I2I2c0'
local WITH_ENTRY = '<ddddI4I4I2I2I2I2c0dI4'
local ENTRY = '<dI4'
local HEADER_SIZE = 48
local EMPTY = '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0' -- a header
local ENTRY_SIZE = 12
local NEWEST_COST_AT = 32 -- the number of bytes before the cost of the newest entry
local STAGED = 5
local RING = 108 -- where it begins, behind the stage
local LAST_STAGED = '107' -- the byte before, as an argument
local DAMAGED = 'DAMAGED' -- raised where a window can't be as it is stored
