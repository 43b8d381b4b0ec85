import { describe, expect, it } from 'vitest';
import { type Check, Failed, NotApplicable, Untestable } from '../../src/conform/check.ts';
import { runConformance } from '../../src/conform/runner.ts';
import { VfioError, VirtioError } from '../../src/errors.ts';
import type { PciFunction, Region } from '../../src/vfio/function.ts';

/** A region of zeros, but for the identity at its start. */
function region(index: number, size: number, identity = 0): Region {
  const nothing = () => {};
  const read = (offset: number) => (offset === 0 ? identity : 0);
  return { index, size, read8: read, read16: read, read32: read, write8: nothing, write16: nothing, write32: nothing };
}

/** A function without any virtio structure, that a test can lose. */
class FakeFunction implements PciFunction {
  readonly address = 'fake';
  readonly config = region(7, 256, 0x1af4);
  readonly iovaRanges = [];
  readonly interruptVectors = 0;
  readonly behindIommu = false;
  gone = false;
  closed = false;
  bar(index: number): Region {
    return region(index, 0);
  }
  allocateDma(): never {
    throw new VfioError('DMA_EXHAUSTED', 'no memory');
  }
  freeDma(): void {}
  setInterrupts(): void {}
  reset(): void {}
  close(): void {
    this.closed = true;
  }
}

function check(id: Check['id'], run: (place: number) => void | Promise<void>): Check {
  let times = 0;
  return { id, section: '1.1', level: 'MUST', title: 'does it', faults: ['none'], run: () => run(times++) };
}

async function run(checks: readonly Check[], functions: FakeFunction[] = [new FakeFunction()], timeout = 50) {
  let opened = 0;
  const open = () => {
    const fn = functions[opened++];
    if (fn === undefined) throw new VfioError('CONNECT_FAILED', 'nobody there');
    return fn;
  };
  const report = await runConformance({ open, checks, timeout });
  return { report, opened, functions };
}

describe('the runner', () => {
  it.each([
    ['pass', () => {}],
    [
      'fail',
      () => {
        throw new Failed('wrong');
      },
    ],
    [
      'fail',
      () => {
        throw new VirtioError('MALFORMED_OBJECT', 'broken');
      },
    ],
    [
      'not-applicable',
      () => {
        throw new NotApplicable('absent');
      },
    ],
    [
      'untestable',
      () => {
        throw new Untestable('hidden');
      },
    ],
  ] as const)('gives the verdict %s', async (verdict, work) => {
    const { report } = await run([check('ADM-001', work)]);
    expect(report.checks.map((result) => result.verdict)).toEqual([verdict]);
  });

  it('says why a statement cannot be tried, without touching the device', async () => {
    const untried: Check = { id: 'ADM-002', section: '1.1', level: 'MUST', title: 'is', untestable: 'nobody can tell' };
    const { report } = await run([untried]);
    expect(report.checks[0]).toMatchObject({ verdict: 'untestable', detail: 'nobody can tell' });
  });

  it('does not take a mistake of its own for one of the device', async () => {
    const broken = check('ADM-003', () => {
      throw new TypeError('a bug');
    });
    await expect(run([broken])).rejects.toThrow('a bug');
  });

  it('ends a check that waits for too long, and goes on', async () => {
    const patient: Check = {
      ...check('ADM-004', () => {}),
      run: async ({ patience }) => {
        await patience.until(() => false, 60_000);
      },
    };
    const { report } = await run([patient, check('ADM-005', () => {})]);
    expect(report.checks.map(({ verdict }) => verdict)).toEqual(['fail', 'pass']);
    expect(report.checks[0].detail).toContain('took too long');
  });

  it('opens a device again that a check has lost', async () => {
    const functions = [new FakeFunction(), new FakeFunction()];
    const losing = check('ADM-006', () => {
      functions[0].gone = true;
      throw new VfioError('DEVICE_GONE', 'it went');
    });
    const { report, opened } = await run([losing, check('ADM-007', () => {})], functions);
    expect(report.checks.map(({ verdict }) => verdict)).toEqual(['fail', 'pass']);
    expect(opened).toBe(2);
    expect(report.lost).toBeNull();
    expect(functions.every(({ closed }) => closed)).toBe(true);
  });

  it('cannot tell about what remains when a device is gone for good', async () => {
    const functions = [new FakeFunction()];
    const losing = check('ADM-008', () => {
      functions[0].gone = true;
      throw new VfioError('DEVICE_GONE', 'it went');
    });
    const rest = [check('ADM-009', () => {}), check('ADM-010', () => {})];
    const { report, opened } = await run([losing, ...rest], functions);
    expect(report.checks.map(({ verdict }) => verdict)).toEqual(['fail', 'untestable', 'untestable']);
    expect(report.checks[2].detail).toBe('the device is gone: nobody there');
    expect(report.lost).toBe('nobody there');
    // It is not tried again for each check.
    expect(opened).toBe(2);
  });

  it('throws what opening the device throws at the beginning', async () => {
    await expect(run([check('ADM-011', () => {})], [])).rejects.toThrow('nobody there');
  });

  it('ends before the next check when it is told to', async () => {
    const controller = new AbortController();
    const checks = [check('ADM-012', () => controller.abort()), check('ADM-013', () => {})];
    const report = await runConformance({
      open: () => new FakeFunction(),
      checks,
      timeout: 50,
      signal: controller.signal,
    });
    expect(report.checks.map(({ id }) => id)).toEqual(['ADM-012']);
  });
});
