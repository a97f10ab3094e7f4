-- charge_answers.lua: writes what became of a charge.
--
-- Needs   n and number (charges.lua), admitted and figures (decide.lua)
-- Gives   answer

local answer = OTHER_PERIOD
if admitted then
  local code = admitted > 0 and ADMITTED or REFUSED
  if n == 1 then
    answer = pack('<Bi8i8i8', code, figures[1], figures[2], figures[3])
  else
    answer = pack('<B' .. string.rep('i8i8i8', n), code, unpack(figures, 1, 3 * n))
  end
  if number ~= 1 then answer = answer .. pack('<I2', admitted) end
end
