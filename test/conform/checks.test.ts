import { describe, expect, it } from 'vitest';
import { AREAS, areaOf, CHECKS } from '../../src/conform/index.ts';
import { FAULTS } from '../../src/device/index.ts';

describe('the conformance checks', () => {
  it('have an id of their own each, in an area that exists', () => {
    const ids = CHECKS.map(({ id }) => id);
    expect(new Set(ids).size).toBe(ids.length);
    for (const id of ids) {
      expect(id).toMatch(/^[A-Z]{3}-\d{3}$/);
      expect(AREAS).toHaveProperty(areaOf(id));
    }
  });

  it('cover every area with checks that run', () => {
    for (const area of Object.keys(AREAS)) {
      const running = CHECKS.filter((check) => areaOf(check.id) === area && 'run' in check);
      expect(running.length, area).toBeGreaterThan(9);
    }
  });

  it('name a section, and what the device does', () => {
    for (const { id, section, title } of CHECKS) {
      expect(section, id).toMatch(/^\d+(\.\d+)+$/);
      expect(title.length, id).toBeGreaterThan(10);
    }
  });

  it('name faults of the software device that prove them, or why they cannot be tried', () => {
    for (const check of CHECKS) {
      if ('untestable' in check) {
        expect(check.untestable.length, check.id).toBeGreaterThan(20);
        continue;
      }
      expect(check.faults.length, check.id).toBeGreaterThan(0);
      for (const fault of check.faults) {
        for (const name of fault.split('+')) expect(FAULTS, check.id).toHaveProperty(name);
      }
    }
  });

  it('are counted up without gaps within an area', () => {
    for (const area of Object.keys(AREAS)) {
      const numbers = CHECKS.filter(({ id }) => areaOf(id) === area).map(({ id }) => Number(id.slice(4)));
      expect(
        numbers.sort((a, b) => a - b),
        area,
      ).toEqual(numbers.map((_, i) => i + 1));
    }
  });
});
