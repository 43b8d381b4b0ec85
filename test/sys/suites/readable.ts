import { createServer } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { MessageChannel, Worker } from 'node:worker_threads';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { EventFd } from '../../../src/sys/eventfd.ts';
import { EventFdSleepers } from '../../../src/sys/eventfd-sleepers.ts';
import { whenReadable } from '../../../src/sys/readable.ts';

const FOREVER = Number.POSITIVE_INFINITY;
const made: EventFd[] = [];
afterEach(() => {
  for (const eventfd of made.splice(0)) eventfd.close();
});

function create(): EventFd {
  const eventfd = EventFd.create();
  made.push(eventfd);
  return eventfd;
}

function wait(eventfd: EventFd, ms: number): Promise<boolean> {
  return new Promise((resolve) => {
    whenReadable(eventfd.fd, ms, resolve);
  });
}

function asleep(sleepers: EventFdSleepers, ms: number): Promise<boolean> {
  return new Promise((resolve, reject) => {
    sleepers.sleep(ms, (result) => (result instanceof Error ? reject(result) : resolve(result)));
  });
}

export function readableSuite(): void {
  describe('waiting until a descriptor is readable', () => {
    it('ends when it is, also when it was before', async () => {
      const eventfd = create();
      for (let i = 0; i < 50; i++) {
        const waited = wait(eventfd, FOREVER);
        if (i % 2 === 0) setTimeout(() => eventfd.signal(), i % 3);
        else eventfd.signal();
        expect(await waited).toBe(true);
        // Nobody has read it.
        expect(await wait(eventfd, FOREVER)).toBe(true);
        expect(eventfd.drain()).toBe(1);
      }
    });

    it('ends after its time, and not before', async () => {
      const eventfd = create();
      for (const ms of [0, 0.3, 1, 20.5]) {
        const start = performance.now();
        expect(await wait(eventfd, ms)).toBe(false);
        expect(performance.now() - start).toBeGreaterThanOrEqual(ms);
      }
    });

    it('never ends before it has begun', () => {
      const eventfd = create();
      eventfd.signal();
      const wake = vi.fn();
      const waiting = whenReadable(eventfd.fd, FOREVER, wake);
      expect(wake).not.toHaveBeenCalled();
      waiting.over = true;
    });

    it('is given up, by whoever is woken first too', async () => {
      const [a, b] = [create(), create()];
      const woken: string[] = [];
      const first = whenReadable(a.fd, FOREVER, () => {
        woken.push('a');
        second.over = true;
      });
      const second = whenReadable(b.fd, FOREVER, () => woken.push('b'));
      const never = whenReadable(a.fd, 1, () => woken.push('never'));
      never.over = true;
      a.signal();
      b.signal();
      await sleep(20);
      expect(woken).toEqual(['a']);
      expect(first.over).toBe(true);
    });

    it('is for as many as there are, each by itself', async () => {
      const all = Array.from({ length: 200 }, create);
      const woken: number[] = [];
      const waits = all.map(async (eventfd, i) => {
        expect(await wait(eventfd, FOREVER)).toBe(true);
        woken.push(i);
      });
      for (const i of [7, 199, 0, 100]) {
        all[i].signal();
        await waits[i];
      }
      expect(woken).toEqual([7, 199, 0, 100]);
      for (const eventfd of all) eventfd.signal();
      await Promise.all(waits);
    });

    it('leaves the event loop all that it has to do: timers, immediates, sockets, messages, other threads', async () => {
      const eventfd = create();
      let over = false;
      const waited = wait(eventfd, FOREVER).then((result) => {
        over = true;
        return result;
      });
      await sleep(5);
      for (let i = 0; i < 20; i++) {
        await new Promise((resolve) => setTimeout(resolve, i % 4));
        await new Promise((resolve) => setImmediate(resolve));
        await new Promise((resolve) => process.nextTick(resolve));
        // A listener and a client that the loop has not heard of yet when the thread falls asleep.
        const server = createServer((socket) => socket.end('hello'));
        await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
        const address = server.address();
        if (address === null || typeof address === 'string') throw new Error('no port');
        const answer = await new Promise<string>((resolve, reject) => {
          import('node:net').then(({ connect }) => {
            const socket = connect(address.port, '127.0.0.1');
            socket.on('data', (data) => resolve(String(data)));
            socket.on('error', reject);
          });
        });
        expect(answer).toBe('hello');
        await new Promise((resolve) => server.close(resolve));
        const { port1, port2 } = new MessageChannel();
        const message = new Promise((resolve) => port2.once('message', resolve));
        port1.postMessage(i);
        expect(await message).toBe(i);
        port1.close();
      }
      const worker = new Worker('require("node:worker_threads").parentPort.postMessage(7)', { eval: true });
      expect(await new Promise((resolve) => worker.once('message', resolve))).toBe(7);
      await worker.terminate();
      expect(over).toBe(false);
      eventfd.signal();
      expect(await waited).toBe(true);
    });

    it('takes no processor', async () => {
      const eventfd = create();
      await wait(eventfd, 50);
      const before = process.cpuUsage();
      expect(await wait(eventfd, 600)).toBe(false);
      const { user, system } = process.cpuUsage(before);
      expect((user + system) / 1000).toBeLessThan(200);
    });

    it('holds the event loop open, and lets go of it afterwards', async () => {
      const eventfd = create();
      const held = () => process.getActiveResourcesInfo().includes('Immediate');
      const idle = () => vi.waitFor(() => expect(held()).toBe(false), { timeout: 10_000 });
      await idle();
      const waited = wait(eventfd, FOREVER);
      expect(held()).toBe(true);
      eventfd.signal();
      await waited;
      await idle();
    });
  });

  describe('sleepers of an eventfd', () => {
    it('are all woken, by a signal that one of them takes away too', async () => {
      const eventfd = create();
      const sleepers = new EventFdSleepers(eventfd);
      const first = asleep(sleepers, FOREVER);
      eventfd.signal();
      // It comes before the first one was woken, and reads the counter.
      expect(await asleep(sleepers, FOREVER)).toBe(true);
      expect(await first).toBe(true);
    });

    it('are woken without a signal, and rejected', async () => {
      const sleepers = new EventFdSleepers(create());
      const woken = [asleep(sleepers, FOREVER), asleep(sleepers, 60_000)];
      sleepers.end(true);
      expect(await Promise.all(woken)).toEqual([true, true]);
      const rejected = expect(Promise.all([asleep(sleepers, FOREVER)])).rejects.toThrow('it is over');
      sleepers.end(new Error('it is over'));
      await rejected;
      expect(await asleep(sleepers, 5)).toBe(false);
    });

    it('lose no signal that comes between two sleeps', async () => {
      const eventfd = create();
      const sleepers = new EventFdSleepers(eventfd);
      let signals = 0;
      let left = 300;
      const signal = () => {
        if (left-- === 0) return;
        signals++;
        eventfd.signal();
        setTimeout(signal, left % 3);
      };
      signal();
      let seen = 0;
      // Who looks after each wake-up what there is to see, has seen all in the end.
      while (seen < 300) {
        expect(await asleep(sleepers, FOREVER)).toBe(true);
        seen = signals;
      }
      expect(seen).toBe(300);
    });
  });
}
