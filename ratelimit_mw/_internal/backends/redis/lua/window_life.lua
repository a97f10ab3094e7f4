-- window_life.lua: how long a window lives that is charged now.
--
-- Needs   a window as windows.lua has read it. A part of it and of window_start.lua
-- Gives   ends: the end of a life that begins now
--         is_audited: whether that has not come to the next multiple of three quarters of a length since `dies`, at each
--         of which the window is audited (window_upkeep.lua)

local ends, period = now + length + (length < 8000000 and 1000000 or length / 8 - length / 8 % 1), 0.75 * length
local is_audited = dies > 0 and dies - dies % period == ends - ends % period
