/**
 * A process that starts software devices on request, many of them one after the other or side by side: `{ id, options }` starts one and
 * is answered by `{ id, error }`, `{ id }` stops it, `{ id, announce }` has it ask its drivers to announce themselves. It ends with the process
 * that started it.
 */
import { startDevice } from '../../dist/src/device/index.js';

const devices = new Map();

process.on('message', ({ id, options, announce }) => {
  let error = null;
  try {
    if (announce === true) {
      for (const one of devices.get(id)?.functions ?? []) one.announce();
    } else if (options === undefined) {
      devices.get(id)?.close();
      devices.delete(id);
    } else {
      devices.set(id, startDevice(options));
    }
  } catch (cause) {
    error = String(cause);
  }
  process.send({ id, error });
});
process.on('disconnect', () => process.exit());
