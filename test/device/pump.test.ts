import { afterEach, describe, expect, it } from 'vitest';
import { type Pollable, Pump } from '../../src/device/pump.ts';
import { pause, until } from './helpers/raw-client.ts';

const pumps: Pump[] = [];
const errors: unknown[] = [];

function pump(...pollables: Pollable[]): Pump {
  const made = new Pump((error) => errors.push(error));
  for (const pollable of pollables) made.add(pollable);
  pumps.push(made);
  return made;
}

/** Something with `work` to do, that notes what is asked of it. */
class Worker implements Pollable {
  work = 0;
  polls = 0;
  armed = false;
  blocked = false;
  /** Work that comes just when notifications are asked for. */
  late = 0;

  poll(): number {
    this.polls++;
    const done = Math.min(this.work, 10);
    this.work -= done;
    return done;
  }

  arm(): boolean {
    this.armed = true;
    this.work += this.late;
    this.late = 0;
    return this.work > 0;
  }

  suppress(): void {
    this.armed = false;
  }
}

afterEach(() => {
  for (const each of pumps.splice(0)) each.close();
  expect(errors.splice(0)).toEqual([]);
});

describe('the pump', () => {
  it('works until there is nothing left, then asks for notifications and sleeps', async () => {
    const worker = new Worker();
    worker.work = 10_000;
    pump(worker).wake();
    expect(worker.armed).toBe(false);
    await until('sleep', () => worker.armed);
    expect(worker.work).toBe(0);
    const { polls } = worker;
    await pause(30);
    expect(worker.polls).toBe(polls);
  });

  it('does the work that came while it was asking for notifications', async () => {
    const worker = new Worker();
    worker.late = 25;
    pump(worker).wake();
    await until('the late work', () => worker.late === 0 && worker.work === 0);
    await until('sleep', () => worker.armed);
  });

  it('lets the event loop run between bursts', async () => {
    const worker = new Worker();
    worker.work = Infinity;
    pump(worker).wake();
    await until('bursts, with turns of the event loop between them', () => worker.polls > 10);
    worker.work = 0;
  });

  it('looks again, ever more rarely, while something is held back', async () => {
    const worker = new Worker();
    worker.blocked = true;
    pump(worker).wake();
    await until('sleep', () => worker.armed);
    const { polls } = worker;
    await pause(200);
    const looks = worker.polls - polls;
    expect(looks).toBeGreaterThan(5);
    expect(looks).toBeLessThan(80);
    worker.blocked = false;
    await pause(40);
    const after = worker.polls;
    await pause(40);
    expect(worker.polls).toBe(after);
  });

  it('survives an error and goes on', async () => {
    const worker = new Worker();
    worker.work = 5;
    let thrown = false;
    const bad: Pollable = {
      poll: () => {
        if (!thrown) {
          thrown = true;
          throw new Error('a bug');
        }
        return 0;
      },
      arm: () => false,
      suppress: () => {},
      blocked: false,
    };
    pump(bad, worker).wake();
    await until('the work', () => worker.work === 0);
    expect(errors.splice(0)).toHaveLength(1);
  });
});
