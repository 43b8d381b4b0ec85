import { expect, it } from 'vitest';
import { BoundedWarnings } from '../../src/device/warnings.ts';

it('tells ten warnings a minute, and how many there were besides', () => {
  const told: string[] = [];
  let now = 5;
  const warnings = new BoundedWarnings(
    (text) => told.push(text),
    () => now,
  );
  for (let i = 0; i < 1000; i++) warnings.warn(`bad ${i}`);
  expect(told).toEqual(Array.from({ length: 10 }, (_, i) => `bad ${i}`));
  now += 60_000;
  warnings.warn('later');
  expect(told.slice(10)).toEqual(['990 more warnings were left out', 'later']);
  now += 60_000;
  warnings.warn('alone');
  expect(told.at(-2)).toBe('later');
});
