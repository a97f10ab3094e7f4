-- texts.lua: writes numbers as arguments of commands: Redis would write each with seventeen digits.
--
-- Needs   nothing.
-- Gives   text(number): the same few times and offsets come again and again

local texts = {}

local function text(number)
  local known = texts[number]
  if not known then
    known = string.format('%.0f', number)
    texts[number] = known
  end
  return known
end
