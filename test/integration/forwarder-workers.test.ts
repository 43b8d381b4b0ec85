import { spawn } from 'node:child_process';
import { afterEach, expect, it } from 'vitest';
import { atEnd, capture, cleanUp, open, receive, send, startDevice, until } from './support.ts';

afterEach(cleanUp);

const example = new URL('../../dist/examples/forwarder-workers.js', import.meta.url).pathname;

it('the example with worker threads sends back every packet, whichever queue it came to', async () => {
  const device = await startDevice({ functions: 2, queuePairs: 2, ipsec: false });
  const child = spawn(process.execPath, [example, device.addresses[0], '2'], { stdio: ['ignore', 'pipe', 'inherit'] });
  let stdout = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  const ended = new Promise<number | null>((resolve) => child.once('exit', resolve));
  atEnd(async () => {
    child.kill('SIGKILL');
    await ended;
  });
  await until(
    () => stdout.includes('forwarding on 2 threads'),
    () => `the example did not start: ${stdout}`,
  );
  const nic = await open(device.addresses[1], { ipsec: 'off' });
  const frames = [...capture('http-ipv4'), ...capture('dns-ipv4')];
  const swapped = frames.map((frame) =>
    Buffer.concat([frame.subarray(6, 12), frame.subarray(0, 6), frame.subarray(12)]),
  );
  // The threads may still be starting; until they have opened their queues the device drops what comes.
  const back = new Set<string>();
  const all = new Set(swapped.map((one) => one.toString('hex')));
  for (let round = 0; back.size < all.size && round < 50; round++) {
    await send(nic, frames, null);
    for (const { frame } of await receive(nic, 1, 100)) back.add(frame.toString('hex'));
  }
  expect(back).toEqual(all);
  child.kill('SIGINT');
  expect(await ended).toBe(0);
  const [, received, sent] = /received (\d+), sent (\d+)/.exec(stdout) ?? [];
  expect(Number(received)).toBeGreaterThanOrEqual(frames.length);
  expect(sent).toBe(received);
  expect(stdout.match(/queue pair \d: released/g)).toHaveLength(2);
});
