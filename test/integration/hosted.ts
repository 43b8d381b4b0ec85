/** A software device in another process with any of its options, also those that the command has none for. */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { DeviceOptions } from '../../src/device/index.ts';
import { atEnd, directory } from './support.ts';

const script = fileURLToPath(new URL('./device-host.mjs', import.meta.url));

export interface HostedDevice {
  /** Of its functions, for `openNic`. */
  readonly addresses: readonly string[];
  /** Has it ask its drivers to announce themselves. */
  announce(): Promise<void>;
}

/** Starts a device that goes with the test. */
export async function hostDevice(
  options: Omit<DeviceOptions, 'sockets'> & { functions?: 1 | 2 } = {},
): Promise<HostedDevice> {
  const child = fork(script, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
  atEnd(() => {
    if (child.connected) child.disconnect();
  });
  const { functions = 1, ...rest } = options;
  const at = directory();
  const sockets = Array.from({ length: functions }, (_, i) => join(at, `nic${i + 1}.sock`));
  const tell = async (message: object) => {
    const ended = once(child, 'exit').then(() => [{ error: 'the device has ended' }]);
    const answer = once(child, 'message');
    child.send({ id: 1, ...message });
    const [{ error }] = await Promise.race([answer, ended]);
    if (error !== null) throw new Error(String(error));
  };
  await tell({ options: { ...rest, sockets } });
  return { addresses: sockets.map((socket) => `vfio-user:${socket}`), announce: () => tell({ announce: true }) };
}
