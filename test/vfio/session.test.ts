import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { VfioError } from '../../src/errors.ts';
import { close, eventfd } from '../../src/sys/libc.ts';
import { SocketSession } from '../../src/vfio/session.ts';

/** A session whose calls take as long as they are told to. */
class TimedSession extends SocketSession {
  protected override serveIdle(): void {}

  protected override translate(error: unknown): VfioError {
    return error instanceof VfioError ? error : new VfioError('DEVICE_GONE', 'gone', { cause: error });
  }

  /** Whether a call that takes `ms` is in time. */
  call(ms: number): boolean {
    const deadline = this.deadline();
    return this.guard(() => {
      vi.advanceTimersByTime(ms);
      return performance.now() <= deadline;
    });
  }
}

const TIMEOUT = 5000;
let session: TimedSession;
beforeEach(() => {
  vi.useFakeTimers({ toFake: ['performance'] });
  const fd = eventfd();
  session = new TimedSession({ fd, close: () => close(fd) }, TIMEOUT, 'device');
});
afterEach(() => {
  session.close();
  vi.useRealTimers();
});

/** Calls of `ms` that were in time until one was not, at most `most`. */
function inTime(ms: number, most: number): number {
  for (let n = 0; n < most; n++) if (!session.call(ms)) return n;
  return most;
}

describe('a device that answers each call just in time', () => {
  it('holds a program up for a few calls, not for all of them', () => {
    expect(inTime(TIMEOUT - 10, 1000)).toBeLessThan(6);
  });

  it('is believed again when it has been prompt for long enough', () => {
    expect(inTime(TIMEOUT - 10, 3)).toBe(3);
    vi.advanceTimersByTime(600_000);
    expect(inTime(TIMEOUT - 10, 3)).toBe(3);
  });
});

it('a device that is prompt may be called for ever', () => {
  expect(inTime(200, 10_000)).toBe(10_000);
  expect(session.call(TIMEOUT - 10)).toBe(true);
});

it('a process that was held up itself blames the device for one call at most', () => {
  session.call(3_600_000);
  expect(inTime(TIMEOUT - 10, 2)).toBe(2);
});
