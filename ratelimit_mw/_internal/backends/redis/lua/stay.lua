-- stay.lua: fails where the keys of an operation may be on two nodes of a cluster.
--
-- Needs   first: the number of keys before the operation's; `is_spread`. A part of whatever writes to several keys
-- Gives   nothing; it raises where the slot of the operation's keys is moving, or is not served here
-- Cost    one command, of a key that there never is: a slot that is moving lacks it, and so refuses it

if is_spread then call('PTTL', KEYS[first + 1] .. '?') end
